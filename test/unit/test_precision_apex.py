"""amp_backend apex: the calls to apex's documented interface, against the stand-in package in test/apex_stand_in."""

from __future__ import annotations

import sys

import pytest
import torch
from workers_precision import STAND_IN, STATIC, Run, same

import optim
from runtime.device import Device
from runtime.divergence import first_non_finite
from runtime.errors import PrecisionError
from runtime.loss_scale import LossScaling
from runtime.precision import make_precision

pytestmark = pytest.mark.core
OLD_TORCH = int(torch.__version__.split(".")[0]) < 2
POLICIES = ["O0", "O2"] if OLD_TORCH else ["O0", "O1", "O2"]


@pytest.fixture
def forget_apex(monkeypatch):
    """Whatever apex this test imports is gone afterwards."""
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    yield monkeypatch
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.fixture
def apex(forget_apex):
    forget_apex.syspath_prepend(STAND_IN)
    from apex import amp

    return amp


@pytest.mark.parametrize("name", POLICIES)
def test_apex_takes_the_native_steps(apex, name):
    ours, theirs = Run(name, STATIC, "sgd_plain"), Run(name, STATIC, "sgd_plain", amp_backend="apex")
    assert apex.calls[-1] == {"opt_level": name, "loss_scale": 128.0 if name != "O0" else 1.0}
    for seed in range(4):
        ours.step(seed, max_norm=0.5), theirs.step(seed, max_norm=0.5)
        assert theirs.head.steps[-1] == ours.head.steps[-1]
    assert same(ours.everything(), theirs.everything())
    assert theirs.precision.scale == ours.precision.scale


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("where", ["backbone", "head"])
def test_an_overflow_skips_backbone_and_head(apex, name, where):
    ours, theirs = Run(name, STATIC, "sgd_plain"), Run(name, STATIC, "sgd_plain", amp_backend="apex")
    before = theirs.everything()
    if where == "backbone":
        theirs.step(1, factor=float("inf"))
    else:
        theirs.precision.backward(theirs.loss(1))
        theirs.head.weight.grad[0, 0] = float("nan")
        theirs.precision.step(theirs.optimizer, head=theirs.head)
    assert same(before, theirs.everything()) and theirs.precision.skipped == 1
    assert theirs.head.steps[-1][-1] == 1.0
    for seed in range(3):
        ours.step(seed), theirs.step(seed)
    assert same(ours.everything(), theirs.everything()) and theirs.precision.skipped == 1


def test_dynamic_scaling_is_apexs_own(apex):
    run = Run("O2", LossScaling(), amp_backend="apex")
    assert apex.calls[-1]["loss_scale"] == "dynamic" and run.precision.scale == 2.0**16
    run.step(0)
    for seed in range(2):
        run.step(seed, factor=float("inf"))
    assert run.precision.scale == 2.0**14
    assert run.head.steps[-1][1] == 2.0**-15  # the scale that this step's loss had


def test_ascends_apex_is_asked_to_combine_gradients(apex, monkeypatch):
    asked, plain = [], apex.initialize

    def initialize(models, optimizers=None, opt_level="O1", loss_scale=None, combine_grad=None):
        asked.append(combine_grad)
        return plain(models, optimizers, opt_level=opt_level, loss_scale=loss_scale)

    monkeypatch.setattr(apex, "initialize", initialize)
    Run("O2", STATIC, amp_backend="apex").step(0)
    assert asked == [True]


@pytest.mark.parametrize("backends", [("apex", "native"), ("native", "apex"), ("apex", "apex")])
def test_checkpoints_move_between_the_backends(apex, backends):
    runs = []
    for seed, backend in enumerate(backends):
        runs.append(Run("O2", LossScaling(), "sgd_plain", seed=seed, amp_backend=backend))
        if seed == 0:
            old = runs[0]
            old.step(1), old.step(2, factor=float("inf")), old.step(3)
            weights = {k: v.clone() for k, v in old.precision.model_state(old.model).items()}
            momentum = optim.optimizer_state(old.optimizer, old.precision.names)
            momentum = {"state": {k: {"momentum_buffer": v["momentum_buffer"].clone()}
                                  for k, v in momentum["state"].items()}}  # fmt: skip
            state, everything, scale = old.precision.state_dict(), old.everything(), old.precision.scale
    assert {v.dtype for v in weights.values()} == {torch.float32, torch.int64}
    new = runs[1]
    new.precision.load_model_state(new.model, weights)
    optim.load_optimizer_state(new.optimizer, momentum, new.precision.names)
    new.precision.load_state_dict(state)
    new.head = old.head
    assert same({**new.everything(), "head": everything["head"]}, everything)
    assert new.precision.scale == scale and new.precision.skipped == 1
    assert new.precision.state_dict() == state
    new.step(5)
    assert new.precision.skipped == 1 and not same(new.everything(), everything)


def test_a_stuck_training_stops(apex):
    run, nan = Run("O2", STATIC, amp_backend="apex", patience=4), float("nan")
    before = run.everything()
    with pytest.raises(
        PrecisionError, match="loss not finite for the last 4 of 4 steps; first not finite: the loss on rank 0"
    ):
        for seed in range(8):
            run.step(seed, nan, diagnose=lambda: first_non_finite(run.model, lambda: run.loss(0, nan)))
    assert same(before, run.everything())


def test_inference_needs_no_initialize(apex):
    run = Run("O2", STATIC, amp_backend="apex")
    calls = len(apex.calls)
    precision = make_precision("O2", run.precision.device, amp_backend="apex")
    precision.prepare(run.model)
    assert len(apex.calls) == calls and precision.cast_input(torch.ones(1)).dtype == torch.float16


def refused(policy="O2"):
    with pytest.raises(PrecisionError) as caught:
        make_precision(policy, Device("cpu") if policy == "O0" else Run("O0").precision.device, amp_backend="apex")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_apex_without_amp_is_one_line_with_the_cure(forget_apex, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("__version__ = '0.1'\n")
    forget_apex.syspath_prepend(str(tmp_path))
    text = refused("O0")
    assert text.startswith("amp_backend apex: the installed apex 0.1 has no amp: ")
    assert "--amp_backend=native" in text


def test_no_apex_is_one_line_with_the_cure(forget_apex):
    forget_apex.setitem(sys.modules, "apex", None)
    text = refused()
    assert text.startswith("amp_backend apex: no apex is installed here") and "--amp_backend=native" in text


def test_auto_is_native_even_where_apex_is_installed(apex):
    calls = len(apex.calls)
    Run("O2", STATIC, amp_backend="auto").step(0)
    assert len(apex.calls) == calls


def test_apex_has_only_its_own_policies(apex):
    assert refused("bf16_master") == "amp_backend apex: it has no policy bf16_master, only O0, O1, O2"
