"""Two ranks, an emulated NPU each, over the emulated hccl."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import workers_npu
from conftest import HERE, STUBS
from ranks import free_port, run_ranks

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


def test_on_three_ranks_hccl_has_only_the_collectives_over_lists(monkeypatch):
    monkeypatch.setenv("NPU_SIM_DEVICES", "3")
    for rank, got in enumerate(run_ranks(workers_npu.collectives, 3)):
        assert got["all_gather"] == [[1, 1], [2, 2], [3, 3]]
        assert got["reduce_scatter_rows"] == [6 * rank, 6 * rank + 3]


def test_what_hccl_does_not_reduce_is_refused_in_one_line():
    for said in run_ranks(workers_npu.not_reduced, 2):
        assert said == [
            f"hccl does not reduce torch.{name}: convert to float32 or int32 before" for name in ("float64", "uint8")
        ]


LOST = """
import os, sys, time, torch
from runtime.device import parse_device
from runtime.dist import open_world
from runtime.log import run_command

def main():
    device = parse_device("npu", int(os.environ["LOCAL_RANK"]))
    device.set()
    with open_world(device, timeout_s=6) as world:
        assert int(os.environ["HCCL_CONNECT_TIMEOUT"]) >= 120 and int(os.environ["HCCL_EXEC_TIMEOUT"]) % 68 == 0
        if world.rank == 1:
            how = sys.argv[1]
            if how == "dies":
                os._exit(7)
            raise RuntimeError("my disk is full")
        world.all_reduce_(torch.ones(1, device=device.torch))
run_command(main)
"""


def test_a_lost_rank_is_named_before_the_watchdog_ends_the_process(root, tmp_path):
    """hccl itself only waits. The watchdog, which names nobody, comes a minute after the group's timeout."""
    path = os.pathsep.join([str(STUBS), str(HERE), str(root)])
    silent = {**os.environ, "PYTHONPATH": path, "NPU_SIM_HCCL_SILENT": "1"}

    def start(how, rank, port):
        torchruns = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**silent, **{name: str(value) for name, value in torchruns.items()}}
        return subprocess.Popen(
            [sys.executable, "-c", LOST, how], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=env
        )

    said = {"dies": "rank 1 died or froze: see its log", "stops": "rank 1 stopped: RuntimeError: my disk is full"}
    started = {how: [start(how, rank, port) for port in [free_port()] for rank in range(2)] for how in said}
    try:
        for how, (waiting, _) in started.items():
            text = waiting.communicate(timeout=900)[1]
            assert waiting.returncode == 1, text
            assert text.splitlines()[-1] == f"error: rank 0 waits in vain: {said[how]}"
    finally:
        for rank in [rank for ranks in started.values() for rank in ranks]:
            rank.kill()
            rank.communicate()


def test_a_tensor_left_on_the_host_is_refused():
    assert all(
        "No backend type associated with device type cpu" in said for said in run_ranks(workers_npu.host_tensor, 2)
    )


def test_data_parallel_steps_are_bit_identical_to_the_cpu_s():
    on_npu, on_cpu = run_ranks(workers_npu.train, 2, "npu", 20), run_ranks(workers_npu.train, 2, "cpu", 20)
    for rank in range(2):
        assert on_npu[rank][0] == on_cpu[rank][0] and len(set(on_cpu[rank][0])) == 20
        assert all(torch.equal(on_npu[rank][1][name], t) for name, t in on_cpu[rank][1].items())
