"""optim.py: parameter groups of upstream projects, the choice of SGD, schedules, optimizer state by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import optim
from runtime.device import Device

pytestmark = pytest.mark.core
CPU = Device("cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.PReLU(4)
        self.linear = nn.Linear(4, 5)
        self.out = nn.Linear(5, 6, bias=False)
        self.last_bn = nn.BatchNorm1d(6)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x))).mean((2, 3))
        return self.last_bn(self.out(self.linear(x)))


def decay_of(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


def test_all_but_batch_norm_decays():
    model = Net()
    assert decay_of(model, optim.parameter_groups(model, "ir_se")) == {
        "conv.weight": 5e-4, "act.weight": 5e-4, "linear.weight": 5e-4, "linear.bias": 5e-4, "out.weight": 5e-4,
        "bn.weight": 0.0, "bn.bias": 0.0, "last_bn.weight": 0.0, "last_bn.bias": 0.0,
    }  # fmt: skip
    assert decay_of(model, optim.parameter_groups(model, "ir", 0.25))["conv.weight"] == 0.25
    assert optim.head_weight_decay("ir") == 5e-4


def test_mobilefacenet_decays_a_tenth_but_for_its_output_and_the_head():
    model = Net()
    decay = decay_of(model, optim.parameter_groups(model, "mobilefacenet"))
    assert len(decay) == 9
    for name in ("conv.weight", "act.weight", "linear.weight", "linear.bias"):
        assert decay[name] == pytest.approx(4e-5, rel=1e-12)
    assert decay["out.weight"] == pytest.approx(4e-4, rel=1e-12)
    assert {decay[name] for name in ("bn.weight", "bn.bias", "last_bn.weight", "last_bn.bias")} == {0.0}
    assert optim.head_weight_decay("mobilefacenet") == pytest.approx(4e-4, rel=1e-12)


def test_frozen_parameters_are_left_out():
    model = Net()
    model.conv.weight.requires_grad_(False)
    assert "conv.weight" not in decay_of(model, optim.parameter_groups(model, "ir"))
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(optim.OptimError, match="no parameter is trained"):
        optim.parameter_groups(model, "ir")


def weights_after_steps(kind, steps=4, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = Net().to(dtype)
    optimizer = optim.make_sgd(optim.parameter_groups(model, "mobilefacenet"), 0.1, 0.9, CPU, kind)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape).to(dtype)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def needs(kind):
    if kind not in CPU.fused_optimizers():
        pytest.skip(f"torch {torch.__version__} has no {kind} on cpu")


@pytest.mark.parametrize("kind", ["auto", "sgd_foreach"])
def test_the_sgd_of_cpu_takes_the_plain_ones_steps_bit_for_bit(kind):
    if kind != "auto":
        needs(kind)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(weights_after_steps(kind, dtype=dtype), weights_after_steps("sgd_plain", dtype=dtype))


def test_the_fused_sgd_differs_from_the_plain_one_by_rounding_only():
    needs("sgd_fused")
    for dtype in (torch.float32, torch.float64):
        fused, plain = weights_after_steps("sgd_fused", dtype=dtype), weights_after_steps("sgd_plain", dtype=dtype)
        # four steps of a few additions each, on values of at most 4
        assert (fused - plain).abs().max() <= 16 * 4 * torch.finfo(dtype).eps


def test_momentum_from_zeros_is_torchs_momentum():
    """make_sgd makes the buffers, torch would make them at the first step: the same numbers."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    a = optim.make_sgd([{"params": list(ours.parameters()), "weight_decay": 5e-4}], 0.1, 0.9, CPU, "sgd_plain")
    b = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        a.step(), b.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))


def test_half_weights_do_not_take_the_fused_sgd_of_cpu():
    """torch 2.13's leaves half of a vector of 16 elements as it is."""
    weight = nn.Parameter(torch.ones(64).half())
    with pytest.raises(optim.OptimError, match="'sgd_fused' does not exist on cpu here"):
        optim.make_sgd([{"params": [weight]}], 0.5, 0.9, CPU, "sgd_fused")
    optimizer = optim.make_sgd([{"params": [weight]}], 0.5, 0.9, CPU)
    weight.grad = torch.ones(64).half()
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((64,), 0.5).half())


def test_an_sgd_that_is_not_here_is_one_line():
    with pytest.raises(optim.OptimError, match="^SGD 'npu_fused_sgd' does not exist on cpu here: choose from auto, "):
        optim.make_sgd([{"params": [nn.Parameter(torch.ones(2))]}], 0.1, 0.9, CPU, "npu_fused_sgd")
    with pytest.raises(optim.OptimError, match="'adam'"):
        optim.make_sgd([{"params": [nn.Parameter(torch.ones(2))]}], 0.1, 0.9, CPU, "adam")


class WithNpuFusedSGD(Device):
    """A device whose vendor has an SGD of its own."""

    class Sgd(torch.optim.SGD):
        is_params_grads_combined = True

    @property
    def torch(self):
        return torch.device("cpu")

    def fused_sgd_class(self):
        return self.Sgd

    def fused_optimizers(self):
        return {"npu_fused_sgd", "sgd_foreach"}


def test_npu_fused_sgd_is_taken_for_the_types_that_it_has():
    device = WithNpuFusedSGD("npu")
    take = lambda dtype: optim.make_sgd([{"params": [nn.Parameter(torch.ones(2).to(dtype))]}], 0.1, 0.9, device)  # noqa: E731
    assert type(take(torch.float32)) is WithNpuFusedSGD.Sgd
    assert type(take(torch.float16)) is WithNpuFusedSGD.Sgd
    assert type(take(torch.bfloat16)) is torch.optim.SGD
    assert type(take(torch.float64)) is torch.optim.SGD


def test_schedules_are_functions_of_the_step():
    lr = optim.milestones(0.1, [1, 3], 0.1, steps_per_epoch=10)
    assert [lr(s) for s in (0, 9)] == [0.1, 0.1]
    assert [lr(s) for s in (10, 29)] == pytest.approx([0.01, 0.01], rel=1e-12)
    assert [lr(s) for s in (30, 1000)] == pytest.approx([0.001, 0.001], rel=1e-12)
    lr_steps = optim.milestones(0.1, (100000, 160000, 220000))
    assert [round(lr_steps(s), 12) for s in (99999, 100000, 160000, 220000)] == [0.1, 0.01, 0.001, 0.0001]
    lr = optim.polynomial(0.4, 2.0, 100)
    assert [lr(s) for s in (0, 50, 100, 150)] == pytest.approx([0.4, 0.1, 0.0, 0.0])
    warm = optim.with_warmup(optim.polynomial(1.0, 1.0, 100), 10)
    assert [warm(s) for s in (0, 4, 9, 10, 60)] == pytest.approx([0.1, 0.5 * 0.96, 0.91, 0.9, 0.4])
    assert optim.with_warmup(lr, 0) is lr


def test_set_lr_reaches_every_group():
    model = Net()
    optimizer = optim.make_sgd(optim.parameter_groups(model, "mobilefacenet"), 0.1, 0.9, CPU)
    optim.set_lr(optimizer, 0.025)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025] * 3


def trained(seed, kind="auto"):
    torch.manual_seed(seed)
    model = Net()
    optimizer = optim.make_sgd(optim.parameter_groups(model, "ir"), 0.1, 0.9, CPU, kind)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
    return model, optimizer, dict(model.named_parameters())


def test_state_by_name_moves_between_kinds_of_sgd():
    _, old, old_names = trained(1)
    state = optim.optimizer_state(old, old_names)
    assert set(state["state"]) == set(old_names)
    _, new, new_names = trained(2, "sgd_plain")
    buffer = new.state[new_names["conv.weight"]]["momentum_buffer"]
    optim.load_optimizer_state(new, state, new_names)
    for name in old_names:
        assert torch.equal(new.state[new_names[name]]["momentum_buffer"], old.state[old_names[name]]["momentum_buffer"])
    assert new.state[new_names["conv.weight"]]["momentum_buffer"] is buffer  # written in place: NpuFusedSGD's rule


def test_half_momentum_is_written_as_fp32():
    weight = nn.Parameter(torch.ones(4).half())
    optimizer = optim.make_sgd([{"params": [weight]}], 0.5, 0.9, CPU)
    weight.grad = torch.ones(4).half()
    optimizer.step()
    state = optim.optimizer_state(optimizer, {"weight": weight})
    assert state["state"]["weight"]["momentum_buffer"].dtype == torch.float32
    optim.load_optimizer_state(optimizer, state, {"weight": weight})
    assert optimizer.state[weight]["momentum_buffer"].dtype == torch.float16


def test_a_state_that_does_not_fit_is_one_line_and_changes_nothing():
    _, optimizer, names = trained(1)
    before = optim.optimizer_state(optimizer, names)["state"]
    before = {name: values["momentum_buffer"].clone() for name, values in before.items()}

    def refused(state, pattern):
        with pytest.raises(optim.OptimError, match=pattern) as caught:
            optim.load_optimizer_state(optimizer, state, names)
        assert "\n" not in str(caught.value)
        for name, p in names.items():
            assert torch.equal(optimizer.state[p]["momentum_buffer"], before[name])

    good = {name: {"momentum_buffer": torch.ones(p.shape)} for name, p in names.items()}
    refused({"state": {**good, "more.weight": {}}}, r"another network.* 1 more \('more.weight' first\)")
    refused({"state": {k: v for k, v in good.items() if k != "bn.bias"}}, r"lacks 1 parameters.*'bn.bias' first")
    refused({"state": {**good, "bn.bias": {"momentum_buffer": torch.ones(9)}}}, r"'bn.bias': \[9\] where \[4\]")
    refused({"state": {**good, "bn.bias": {}}}, r"'bn.bias': nothing where \[4\]")
    refused(torch.optim.SGD([names["conv.weight"]], lr=1.0).state_dict(), "another network")
    refused({"state": {0: {"momentum_buffer": torch.ones(4)}}}, "not by parameter name")
    refused({"param_groups": []}, "not by parameter name")
