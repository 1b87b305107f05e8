"""The device as a value, on the cpu that every machine has. The emulated NPU has its own tests in test/npu."""

from __future__ import annotations

import importlib.util
import os
import platform
import random
import subprocess
import sys
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.layers import BatchNorm2d
from runtime import device as module
from runtime import host
from runtime.device import Device, check_ranks, device_count, parse_device, reason_unavailable
from runtime.errors import DeviceError
from runtime.log import run_command

pytestmark = pytest.mark.core
CPU = Device("cpu")


@pytest.fixture
def kinds(monkeypatch):
    """kinds(cuda=2, npu=0): a machine with so many devices of each kind."""

    def pretend(**counts):
        for kind, count in counts.items():
            monkeypatch.setattr(
                module.KINDS[kind], "reason_unavailable", lambda n=count: None if n else "there is none"
            )
            monkeypatch.setattr(module.KINDS[kind], "count", lambda n=count: n)

    return pretend


@pytest.mark.parametrize(
    "text, index, kind, number",
    [
        ("npu:1", None, "npu", 1),
        ("npu", 1, "npu", 1),
        ("cuda", None, "cuda", 0),
        ("gpu", None, "cuda", 0),
        ("GPU:1", None, "cuda", 1),
        (" cuda:1 ", 0, "cuda", 1),
        ("cpu", None, "cpu", 0),
        ("cpu", 3, "cpu", 0),
        ("cpu:2", None, "cpu", 0),
    ],
)
def test_parsing(kinds, text, index, kind, number):
    kinds(cuda=2, npu=2)
    assert parse_device(text, index) == Device(kind, number)


@pytest.mark.parametrize("npu, cuda, best", [(1, 1, "npu"), (0, 1, "cuda"), (1, 0, "npu"), (0, 0, "cpu")])
def test_auto_takes_npu_else_cuda_else_cpu(kinds, npu, cuda, best):
    kinds(npu=npu, cuda=cuda)
    assert parse_device("auto") == parse_device() == Device(best)


@pytest.mark.parametrize("text", ["tpu", "", "npu:", "npu:-1", "cuda:1:2", "mps", "cuda 1"])
def test_an_unknown_device_lists_the_choices(text):
    with pytest.raises(DeviceError, match="choose from auto, cpu, cuda, npu or gpu"):
        parse_device(text)


def test_an_index_beyond_the_devices_says_how_many_there_are(kinds):
    kinds(cuda=2)
    with pytest.raises(DeviceError, match="cuda:2 does not exist: this process sees 2 cuda devices, numbered from 0"):
        parse_device("cuda:2")
    with pytest.raises(DeviceError, match="cuda:-1 does not exist"):
        parse_device("cuda", -1)


def test_an_absent_device_says_why(kinds):
    kinds(npu=0)
    with pytest.raises(DeviceError, match="no npu here: there is none"):
        parse_device("npu:3")


def test_reasons_are_one_line_with_a_cure_and_the_cpu_needs_none():
    assert reason_unavailable("cpu") is None and device_count("cpu") == 1
    for kind in ("cuda", "npu"):
        reason = reason_unavailable(kind)
        if reason is None:
            assert device_count(kind) > 0
        else:
            assert device_count(kind) == 0 and "\n" not in reason and "install" in reason


def test_hidden_gpus_are_named_as_the_reason(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert reason_unavailable("cuda") == "CUDA_VISIBLE_DEVICES='' leaves no GPU visible; unset it or name one"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "nvidia-smi" in reason_unavailable("cuda")


def test_more_ranks_than_devices(kinds):
    kinds(cuda=2)
    check_ranks(Device("cuda"), 2)
    check_ranks(CPU, 64)
    with pytest.raises(DeviceError, match="8 ranks on this machine, but 2 cuda devices: start with RANK_SIZE=2, or"):
        check_ranks(Device("cuda"), 8)
    with pytest.raises(DeviceError, match="2 ranks on this machine, but 1 cuda device from cuda:1 on"):
        check_ranks(Device("cuda", 1), 2)


def test_a_device_is_a_frozen_value_that_opens_nothing():
    first = Device("npu", 3)
    assert first == Device("npu", 3) and len({first, Device("npu", 3)}) == 1 and first.backend == "hccl"
    assert (Device("cuda").backend, CPU.backend, CPU.torch) == ("nccl", "gloo", torch.device("cpu"))
    assert str(Device("cuda", 1)) == "cuda:1" and Device("cuda", 1).torch == torch.device("cuda", 1)
    with pytest.raises(FrozenInstanceError):
        first.index = 0


def test_a_device_that_cannot_be_opened_is_one_line(monkeypatch):
    def vanish(index):
        raise RuntimeError("CUDA error: device vanished\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "set_device", vanish)
    with pytest.raises(DeviceError, match=r"^cuda:0 cannot be opened: CUDA error: device vanished$"):
        Device("cuda").set()


@pytest.mark.parametrize(
    "kind, said, told",
    [
        (
            "cuda",
            "CUDA error: unspecified launch failure\nCompile with ...",
            r"^cuda:0 failed while it computed \(CUDA error: unspecified launch failure\): see whether nvidia-smi "
            r"still lists it, and go on with --resume or on another --device_id$",
        ),
        ("npu", "call aclrtSynchronizeStream failed, EL0004", "^npu:0 failed while .* npu-smi info still lists it"),
        ("cuda", "CUDA out of memory. Tried to allocate 2 GiB", "^cuda:0 is out of memory .*lower --batch_size"),
        ("cpu", "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", "^cpu is out of memory"),
    ],
)
def test_a_device_that_fails_while_it_computes_is_one_line(kind, said, told):
    with pytest.raises(DeviceError, match=told), Device(kind).failures_explained():
        raise RuntimeError(said)


@pytest.mark.parametrize(
    "kind, error",
    [
        (
            "cuda",
            RuntimeError("NCCL error: unhandled cuda error, CUDA error: peer gone"),
        ),  # runtime.dist names the rank
        ("cuda", RuntimeError("shapes do not match")),
        ("cuda", DeviceError("CUDA error: said already")),
        ("cpu", RuntimeError("CUDA error: of another device")),
        ("cuda", ValueError("CUDA error: no RuntimeError")),
    ],
)
def test_other_errors_are_left_alone(kind, error):
    with pytest.raises(type(error)) as caught, Device(kind).failures_explained():
        raise error
    assert caught.value is error


def test_tuning_says_what_is_on(monkeypatch):
    assert CPU.tune(tf32=True, autotune=True) == {"tf32": False, "autotune": False}
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        for on in (True, False):
            assert Device("cuda").tune(tf32=on, autotune=not on) == {"tf32": on, "autotune": not on}
            assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == (on, on, not on)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
    switch = SimpleNamespace(allow_hf32=False)
    monkeypatch.setattr(torch, "npu", SimpleNamespace(matmul=switch), raising=False)
    assert Device("npu").tune(tf32=True) == {"tf32": True, "autotune": False} and switch.allow_hf32
    monkeypatch.setattr(torch, "npu", SimpleNamespace(), raising=False)
    assert Device("npu").tune(tf32=True) == {"tf32": False, "autotune": False}


def test_the_cpu_keeps_freed_memory_for_the_next_step(root):
    """In a process of its own, because there is no way back. 64 MiB stay resident after their tensor is gone."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the switch is glibc's")
    code = """
import sys, torch
from runtime.device import Device
CPU = Device("cpu")
if sys.argv[1] == "kept":
    CPU.set()
before = CPU.memory_allocated()
block = torch.ones(64 * 2**20 // 4)
del block
print(CPU.memory_allocated() - before)
"""
    left = {}
    for how in ("kept", "freed"):
        done = subprocess.run([sys.executable, "-c", code, how], cwd=root, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        left[how] = int(done.stdout)
    assert left["kept"] > 60 * 2**20 > 30 * 2**20 > left["freed"]


@pytest.mark.parametrize("library", [OSError("there is no libc"), object()])
def test_a_c_library_without_the_switch_changes_nothing(monkeypatch, library):
    def load(name):
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(host.ctypes, "CDLL", load)
    CPU.set()


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(2).tolist(), random.gauss(0, 1)


def test_seed_governs_every_generator():
    CPU.seed(7)
    first = draw()
    CPU.seed(7)
    assert draw() == first
    CPU.seed(8)
    assert all(a != b for a, b in zip(draw(), first))


@pytest.mark.parametrize("drawn_before", [0, 1])  # after one, both Gauss generators hold a spare number
def test_rng_state_continues_where_it_was_and_is_tensors(drawn_before, tmp_path):
    CPU.seed(2**33 + 1)
    for _ in range(drawn_before):
        draw()
    state = CPU.rng_state()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    torch.save(state, tmp_path / "state.pt")
    then = [draw() for _ in range(3)]
    CPU.seed(0)
    CPU.set_rng_state(torch.load(tmp_path / "state.pt"))
    assert [draw() for _ in range(3)] == then


def test_memory_on_cpu_is_the_process_s(root):
    """In a process of its own: in this one an earlier test may have asked it to keep what it frees (Device.set)."""
    code = """
import os, torch
from runtime.device import Device
CPU = Device("cpu")
before = CPU.memory_allocated()
block = torch.ones(64 * 2**20 // 4)  # 64 MiB
assert CPU.memory_allocated() - before > 60 * 2**20
assert CPU.memory_allocated() <= CPU.max_memory_allocated() < CPU.total_memory()
del block
CPU.reset_peak_memory()
CPU.empty_cache()
CPU.synchronize()
if os.access("/proc/self/clear_refs", os.W_OK):
    assert CPU.max_memory_allocated() < before + 60 * 2**20
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def test_supports_tells_what_trains_here():
    assert CPU.supports(torch.float32) and CPU.supports(torch.float64)
    assert not CPU.supports(torch.int64)
    recent = hasattr(torch, "autocast")
    # torch 1.8 has no float16 convolution on cpu, and no bfloat16 batch norm
    assert CPU.supports(torch.float16) is CPU.supports(torch.bfloat16) is recent


def test_the_probe_leaves_the_random_numbers_alone():
    module._has_arithmetic.cache_clear()
    CPU.seed(1)
    expected = torch.rand(3)
    CPU.seed(1)
    CPU.supports(torch.float32)
    assert torch.equal(torch.rand(3), expected)


def test_batch_norm_is_as_exact_as_float32_allows_in_the_layout_that_the_cpu_prefers():
    """Against float64, over as many pixels as a batch of eight has behind the first convolution."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 8, 112, 112, generator=generator) * 2 + 1
    exact = torch.nn.BatchNorm2d(8).double()(x.double())
    taken = BatchNorm2d(8)(x.contiguous(memory_format=CPU.memory_format)).double()
    assert (taken - exact).norm() < 1e-6 * exact.norm()


def test_autocast():
    a = torch.ones(4, 4)
    with CPU.autocast(None):
        assert (a @ a).dtype == torch.float32
    with CPU.autocast(torch.bfloat16, enabled=False):
        assert (a @ a).dtype == torch.float32
    if hasattr(torch, "autocast"):
        with CPU.autocast(torch.bfloat16):
            assert (a @ a).dtype == torch.bfloat16
            with CPU.autocast(torch.float32):
                assert (a @ a).dtype == torch.float32
    else:
        with pytest.raises(DeviceError, match="autocast to bfloat16 on cpu needs torch 1.10"):
            CPU.autocast(torch.bfloat16)


def test_scaler_class_scales_on_this_device():
    scaler_class = CPU.grad_scaler_class()
    if scaler_class is None:
        assert not hasattr(torch.amp if hasattr(torch, "amp") else torch, "GradScaler")
    else:
        assert scaler_class(init_scale=8.0).scale(torch.tensor(2.0)) == 16.0


def test_quick_sgds_are_named_only_where_they_step():
    names = CPU.fused_optimizers()
    assert names <= {"sgd_foreach", "sgd_fused"} and CPU.fused_sgd_class() is None
    for how in ("foreach", "fused"):
        weight = torch.ones(2, requires_grad=True)
        weight.grad = torch.ones(2)
        if f"sgd_{how}" in names:
            torch.optim.SGD([weight], lr=1.0, **{how: True}).step()
            assert weight.tolist() == [0.0, 0.0]
    assert ("sgd_foreach" in names) is ("foreach" in torch.optim.SGD.__init__.__code__.co_varnames)


def test_no_streams_on_cpu_and_prefetch_is_a_plain_map():
    assert CPU.event() is None
    moved = []
    batches = CPU.prefetch(iter([1, 2, 3]), lambda b: moved.append(b) or b * 10)
    assert next(batches) == 10 and moved == [1]
    assert list(batches) == [20, 30]


def test_description_is_plain_values():
    facts = CPU.describe()
    assert facts["kind"] == "cpu" and facts["torch"] == torch.__version__ and facts["count"] == 1
    assert facts["memory"] == CPU.total_memory() and "cores" in facts["name"]
    assert all(isinstance(value, (str, int)) for value in facts.values())


def test_profiler_activities_profile():
    activities = CPU.profiler_activities()
    with CPU.profiler_module().profile(activities=activities) as profile:
        torch.ones(2) + 1
    assert any("add" in event.key for event in profile.key_averages())


@pytest.fixture
def command(monkeypatch, capsys):
    """command("cuda", "--ranks", "2") -> (status, stdout, stderr) of `python -m runtime.device cuda --ranks 2`."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["device.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_command(module.main)
        return (ended.value.code, *capsys.readouterr())

    return run


def test_the_command_prints_what_is_here_and_what_is_missing(root):
    done = subprocess.run([sys.executable, "-m", "runtime.device"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    for kind in ("cpu", "cuda", "npu"):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(kind + ": ")]
        assert ("not here" in line) is (reason_unavailable(kind) is not None)


def test_the_command_checks_a_device_and_its_ranks(command, kinds):
    kinds(cuda=2, npu=0)
    assert command("auto", "--ranks", "2") == (0, "cuda\n", "")
    assert command("cpu", "--ranks", "64") == (0, "cpu\n", "")
    assert command("gpu", "--index", "1") == (0, "cuda\n", "")
    assert command("npu") == (1, "", "error: no npu here: there is none\n")
    status, out, error = command("cuda", "--index", "1", "--ranks", "2")
    assert (status, out) == (1, "") and error.startswith("error: 2 ranks on this machine, but 1 cuda device from")


@pytest.fixture
def fake_torch_npu(tmp_path, monkeypatch):
    """fake_torch_npu(code): a torch_npu that does `code` when it is imported."""
    if hasattr(torch, "npu"):
        pytest.skip("there is an npu")

    def install(code):
        (tmp_path / "torch_npu").mkdir()
        (tmp_path / "torch_npu" / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        module._load_torch_npu.cache_clear()

    yield install
    sys.modules.pop("torch_npu", None)
    module._load_torch_npu.cache_clear()


@pytest.mark.parametrize(
    "code, said",
    [
        (
            "raise ImportError('libhccl.so: cannot open shared object file')",
            "libhccl.so: cannot open shared object file",
        ),
        (r"raise RuntimeError('Two accelerators\ncannot be used at the same time')", "Two accelerators"),
    ],
)
def test_torch_npu_that_does_not_load(fake_torch_npu, command, code, said):
    fake_torch_npu(code)
    assert command("npu:0") == (
        1,
        "",
        "error: no npu here: torch_npu is installed but does not load "
        f"({said}); install CANN and `source test/env_npu.sh` before the command\n",
    )


def test_torch_npu_without_cann_is_one_line_of_a_command(root, tmp_path):
    """In a process of its own: a recent torch would load torch_npu at `import torch` and end in a traceback."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so')")
    metadata = tmp_path / "torch_npu-2.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    del env["TORCH_DEVICE_BACKEND_AUTOLOAD"]
    done = subprocess.run(
        [sys.executable, "-m", "runtime.device", "npu"], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "error: no npu here: torch_npu is installed but does not load (libhccl.so); "
        "install CANN and `source test/env_npu.sh` before the command\n"
    )


def test_auto_passes_a_broken_torch_npu_over_and_says_so(fake_torch_npu, caplog):
    fake_torch_npu("raise ImportError('libhccl.so')")
    assert parse_device("auto").kind != "npu"
    assert "no npu here, which is passed over: torch_npu is installed but does not load (libhccl.so)" in caplog.text


def test_torch_npu_is_not_imported_for_another_device(fake_torch_npu):
    fake_torch_npu("raise AssertionError('imported')")
    parse_device("cpu")
    assert "torch_npu" not in sys.modules


def test_a_torch_npu_for_another_torch_is_named(fake_torch_npu):
    fake_torch_npu("")
    with pytest.raises(DeviceError, match="torch_npu loads but brings no torch.npu; install the one for this torch"):
        parse_device("npu")


def test_no_torch_npu_names_the_package():
    if importlib.util.find_spec("torch_npu") is not None or hasattr(torch, "npu"):
        pytest.skip("torch_npu is installed here")
    with pytest.raises(DeviceError, match="torch_npu is not installed; .* install CANN .* torch-npu=="):
        parse_device("npu")
