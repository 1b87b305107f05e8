"""runtime.device on the emulated NPU: the one value that the rest of the project computes with."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from runtime.device import Device, best_kind, device_count, parse_device, reason_unavailable
from runtime.errors import DeviceError

pytestmark = pytest.mark.npu


@pytest.fixture
def npu():
    device = Device("npu", 1)
    device.set()
    yield device
    Device("npu", 0).set()


def test_it_is_found_first():
    assert best_kind() == "npu" and parse_device("auto").kind == "npu" and reason_unavailable("npu") is None
    assert device_count("npu") == 2
    assert parse_device("NPU:1") == Device("npu", 1) and parse_device("npu", 1) == Device("npu", 1)


def test_an_index_that_is_not_there():
    with pytest.raises(DeviceError, match=r"npu:2 does not exist: this process sees 2 npu devices"):
        parse_device("npu:2")


def test_cuda_beside_it_is_named_as_missing():
    with pytest.raises(DeviceError, match="no cuda here"):
        parse_device("cuda")


def test_setting_it_makes_it_the_current_one(npu):
    assert torch.npu.current_device() == 1 and npu.torch == torch.device("npu:1")
    assert npu.backend == "hccl"
    npu.synchronize()


def test_memory_is_the_device_s(npu):
    npu.reset_peak_memory()
    before = npu.memory_allocated()
    x = torch.zeros(1 << 20, device=npu.torch)
    assert npu.memory_allocated() == before + 4 * x.numel()
    del x
    npu.empty_cache()
    assert npu.memory_allocated() == before and npu.max_memory_allocated() == before + (4 << 20)
    assert npu.total_memory() == 32 << 30


def _draw(device):
    return [random.random(), np.random.rand(), torch.rand(2).tolist(), torch.rand(2, device=device.torch).tolist()]


def test_seeding_and_the_state_of_the_generators(npu):
    npu.seed(3)
    first = _draw(npu)
    state = npu.rng_state()
    second = _draw(npu)
    npu.seed(3)
    assert _draw(npu) == first != second
    npu.set_rng_state(state)
    assert _draw(npu) == second
    assert all(t.device.type == "cpu" for t in state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_that_it_trains_in(npu, dtype):
    assert npu.supports(dtype)


def test_a_chip_without_bfloat16(npu_python):
    code = """
import torch
from runtime.device import parse_device
device = parse_device("npu")
print(device.supports(torch.float16), device.supports(torch.bfloat16), device.describe()["name"])
"""
    done = npu_python("-c", code, NPU_SIM_BF16="0", NPU_SIM_NAME="Ascend910A")
    assert done.stdout == "True False Ascend910A\n", done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(npu, dtype):
    x = torch.ones(2, 2, device=npu.torch)
    with npu.autocast(dtype):
        assert (x @ x).dtype == dtype
    with npu.autocast(dtype, enabled=False):
        assert (x @ x).dtype == torch.float32


def test_vendors_parts_are_found(npu, emulated_npu):
    assert npu.grad_scaler_class() is torch.npu.amp.GradScaler
    assert npu.fused_sgd_class() is emulated_npu.optim.NpuFusedSGD
    assert "npu_fused_sgd" in npu.fused_optimizers() and "sgd_foreach" in npu.fused_optimizers()


def test_streams_and_events(npu):
    before, after, stream = npu.event(), npu.event(), torch.npu.Stream(device=npu.torch)
    before.record()
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
    after.record()
    after.synchronize()
    assert before.elapsed_time(after) >= 0


def test_prefetch_hands_over_every_batch_in_order(npu):
    batches = [(torch.full((2,), float(i)), torch.tensor([i])) for i in range(5)]

    def move(batch):
        return tuple(t.to(npu.torch, non_blocking=True) for t in batch)

    moved = list(npu.prefetch(batches, move))
    assert [(x.tolist(), y.tolist()) for x, y in moved] == [(x.tolist(), y.tolist()) for x, y in batches]
    assert all(t.device == npu.torch for batch in moved for t in batch)


def test_describe_is_plain_and_whole(npu):
    facts = npu.describe()
    assert facts["device"] == "npu:1" and facts["name"] == "Ascend910B3" and facts["count"] == 2
    assert facts["memory"] == 32 << 30 and facts["torch"] == torch.__version__ and facts["torch_npu"]


def test_profiler_sees_a_step(npu):
    with npu.profiler_module().profile(activities=npu.profiler_activities()) as profile:
        torch.ones(3, device=npu.torch).add_(1)
    assert any("add_" in event.key for event in profile.key_averages())


def test_cores_are_counted_before_the_device_opens(npu_python):
    """Some releases of CANN bind the process to its share of the cores when the device opens (CPU_AFFINITY_CONF)."""
    code = """
import os
from runtime.device import parse_device
from runtime.dist import ALONE
before = len(os.sched_getaffinity(0))
parse_device("npu").set()
after = len(os.sched_getaffinity(0))
assert after == max(1, before // 2) and ALONE.core_share() == before, (before, after, ALONE.core_share())
"""
    done = npu_python("-c", code, NPU_SIM_AFFINITY="1")
    assert done.returncode == 0, done.stderr


def test_layouts(npu):
    assert npu.layout("auto") == npu.layout("fastest") == npu.layout("contiguous") == torch.contiguous_format
    with pytest.raises(DeviceError, match="^--memory_format=channels_last: torch_npu has no such layout; leave"):
        npu.layout("channels_last")


def test_precision_is_said_and_recorded(npu):
    for on in (True, False):
        said = npu.tune(tf32=on)
        assert torch.npu.matmul.allow_hf32 is torch.npu.conv.allow_hf32 is said["tf32"] is on
    assert torch.npu.options["ACL_PRECISION_MODE"] == said["precision_mode"] == "must_keep_origin_dtype"
    assert torch.npu.config.allow_internal_format is said["internal_format"] is False


def test_the_command(npu_python):
    assert npu_python("-m", "runtime.device", "auto").stdout == "npu\n"
    assert npu_python("-m", "runtime.device", "npu", "--ranks", 8, NPU_SIM_DEVICES="8").stdout == "npu\n"
    whole = npu_python("-m", "runtime.device")
    assert "npu: 2 x Ascend910B3, 32 GiB" in whole.stdout and "ranks talk over hccl" in whole.stdout
    assert whole.returncode == 0, whole.stderr


@pytest.mark.parametrize(
    "devices, message",
    [
        ("0", "no npu here: torch_npu is installed but sees no device"),
        ("1", "2 ranks on this machine"),
    ],
)
def test_too_few_devices(npu_python, devices, message):
    done = npu_python("-m", "runtime.device", "npu", "--ranks", 2, NPU_SIM_DEVICES=devices)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {message}")


def test_importing_the_runtime_opens_nothing(npu_python):
    code = "import sys, runtime.device, runtime.dist, runtime.precision; print('torch_npu' in sys.modules)"
    assert npu_python("-c", code).stdout == "False\n"
