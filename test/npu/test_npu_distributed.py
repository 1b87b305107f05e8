"""Two ranks, an emulated NPU each, over the emulated hccl."""

from __future__ import annotations

import pytest
import torch
import workers_npu
from ranks import run_ranks

pytestmark = pytest.mark.npu


def test_the_world_s_collectives():
    first, second = run_ranks(workers_npu.collectives, 2)
    assert first["sum"] == [3, 3] and first["max"] == [2, 2] and first["broadcast"] == [2, 2]
    assert first["all_gather"] == [[1, 1], [2, 2]]
    assert first["gather_rows"] == [[1, 1], [2, 2], [2, 2]]
    assert first["objects"] == [{"rank": 0}, {"rank": 1}]
    assert first["reduce_scatter_rows"] == [0, 2] and second["reduce_scatter_rows"] == [4, 6]
    assert (first["device"], second["device"]) == ("npu:0", "npu:1")
    assert {k: v for k, v in first.items() if k not in ("reduce_scatter_rows", "device")} == {
        k: v for k, v in second.items() if k not in ("reduce_scatter_rows", "device")
    }


def test_a_tensor_left_on_the_host_is_refused():
    assert all(
        "No backend type associated with device type cpu" in said for said in run_ranks(workers_npu.host_tensor, 2)
    )


def test_data_parallel_steps_are_bit_identical_to_the_cpu_s():
    on_npu, on_cpu = run_ranks(workers_npu.train, 2, "npu", 20), run_ranks(workers_npu.train, 2, "cpu", 20)
    for rank in range(2):
        assert on_npu[rank][0] == on_cpu[rank][0] and len(set(on_cpu[rank][0])) == 20
        assert all(torch.equal(on_npu[rank][1][name], t) for name, t in on_cpu[rank][1].items())
