"""--static: the compiled backbone takes the eager one's steps, and what it saves is the eager one's."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_set import make_tiny_set
from workers_static import run, run_on_a_rank, small_model

import model
from checkpoint import store
from config import Config, replace
from learner import Learner
from runtime import device as device_module
from runtime.device import Device
from runtime.errors import DeviceError

pytestmark = pytest.mark.core
CPU = Device("cpu")
needs_compiler = pytest.mark.skipif(
    CPU.missing_for_compiling() is not None,
    reason=f"nothing compiles here: {CPU.missing_for_compiling()}")  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three steps of four images."""
    folder = tmp_path_factory.mktemp("static")
    return Config(
        net_mode="mobilefacenet",
        embedding_size=16,
        data_path=str(make_tiny_set(folder / "set")),
        batch_size=4,
        epochs=1,
        max_iter=3,
        lr=1e-3,
        work_path=str(folder / "work"),
        device_type="cpu",
        num_workers=0,
        log_every=1,
        with_test=False,
        tensorboard=False,
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Compiled code of these tests alone, shared by them and their ranks."""
    folder = tmp_path_factory.getbasetemp() / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    yield
    if hasattr(torch, "_dynamo"):
        torch._dynamo.reset()


def losses(config):
    with open(f"{config.work_path}/log/metrics.jsonl") as file:
        return [line["loss"] for line in map(json.loads, file) if line["kind"] == "step"]


@pytest.fixture(scope="module")
def eager(config, tmp_path_factory):
    config = replace(config, work_path=str(tmp_path_factory.mktemp("eager")))
    before, after, _ = run(config)
    return losses(config), after - before


@needs_compiler
@pytest.mark.slow
def test_the_compiled_backbone_takes_the_eager_steps_and_saves_its_checkpoint(config, eager, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        Device,
        "compiled",
        lambda self, module, method=Device.compiled: compiled.append(method(self, module)) or compiled[-1],
    )
    before, after, keys = run(replace(config, static=True))
    assert len(compiled) == 1 and "Optimized" in type(compiled[0]).__name__
    eager_losses, moved = eager
    assert len(eager_losses) == 3
    np.testing.assert_allclose(losses(config), eager_losses, rtol=1e-5)
    assert np.linalg.norm(after - before - moved) < 1e-3 * np.linalg.norm(moved)

    path = store.newest(f"{config.work_path}/models")
    saved = store.load_pth(path)["model"]
    assert list(saved) == keys and not any("_orig_mod" in key for key in saved)
    monkeypatch.setattr(model, "create_model", small_model)
    resumed = Learner.from_config(replace(config, static=False, resume=str(path)))
    assert resumed.progress.step == 3
    assert all(torch.equal(value, saved[name]) for name, value in resumed.backbone.state_dict().items())


@needs_compiler
def test_two_ranks_compile_each_and_stay_together(config, tmp_path):
    # batch norm over two images blows the rounding up with more
    config = replace(config, work_path=str(tmp_path / "eager"), lr=1e-5)
    eager_ranks = run_ranks(run_on_a_rank, 2, config)
    static = replace(config, static=True, work_path=str(tmp_path / "static"))
    ranks = run_ranks(run_on_a_rank, 2, static)
    np.testing.assert_array_equal(ranks[0][1], ranks[1][1])
    np.testing.assert_allclose(losses(static), losses(config), rtol=1e-5)
    moved = eager_ranks[0][1] - eager_ranks[0][0]
    assert np.linalg.norm(ranks[0][1] - ranks[0][0] - moved) < 1e-3 * np.linalg.norm(moved)


def test_a_compiler_that_does_not_work_is_one_line(monkeypatch):
    """It is found, so that nothing is missing, but cannot compile."""
    if not hasattr(torch, "compile"):
        with pytest.raises(DeviceError, match="static mode.*needs torch 2.0 or newer"):
            CPU.compiled(torch.nn.Identity())
        return

    def broken(*arguments, **options):
        def call(*inputs):
            raise RuntimeError("C++ compile error\nOutput:\nfatal error: math.h: No such file")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(device_module.shutil, "which", lambda name: sys.executable)
    device_module._why_compiling_fails.cache_clear()
    try:
        with pytest.raises(
            DeviceError,
            match=r"^static mode \(torch.compile\) on cpu: compiling a tiny function fails "
            r"\(C\+\+ compile error\); repair the compiler, or leave --static out$",
        ):
            CPU.compiled(torch.nn.Identity())
    finally:
        device_module._why_compiling_fails.cache_clear()


@pytest.mark.parametrize(
    "kind, packages, said",
    [
        ("cuda", {}, "the package triton is not installed; pip install triton"),
        ("cuda", {"triton"}, None),
        ("npu", {"torchair"}, "torch.compile needs torch_npu._inductor (torch_npu 2.6 or newer), and NPU graphs need "
         "torch_npu 2.5; install them"),
        ("npu", {"torch_npu._inductor"}, "torch.compile needs triton (triton-ascend), and NPU graphs need "
         "torch_npu 2.5; install them"),
        ("npu", {"torch_npu._inductor", "triton"}, None),
    ],
)  # fmt: skip
def test_what_compiling_needs_on_each_device(kind, packages, said, monkeypatch):
    monkeypatch.setattr(device_module.importlib.util, "find_spec", lambda name: name if name in packages else None)
    monkeypatch.setattr(torch, "compile", lambda module: module, raising=False)
    assert Device(kind).missing_for_compiling() == said


def test_what_compiling_needs_on_cpu(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: module, raising=False)
    monkeypatch.setattr(device_module.shutil, "which", {"g++": None, "my++": "/bin/my++"}.get)
    monkeypatch.delenv("CXX", raising=False)
    assert CPU.missing_for_compiling() == "there is no C++ compiler (g++, clang++ or $CXX); install one"
    monkeypatch.setenv("CXX", "my++")
    assert CPU.missing_for_compiling() is None
    monkeypatch.delattr(torch, "compile")
    assert "it needs torch 2.0 or newer" in CPU.missing_for_compiling()
