"""What tests of runtime.precision share, and the functions that its spawned ranks run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import optim
from runtime.device import Cpu
from runtime.dist import ALONE
from runtime.divergence import first_non_finite
from runtime.errors import PrecisionError
from runtime.loss_scale import LossScaling
from runtime.precision import make_precision

STAND_IN = str(Path(__file__).resolve().parent / "apex_stand_in")
STATIC = LossScaling(init_loss_scaling=128.0, use_dynamic_loss_scaling=False)


class AnyType(Cpu):
    """A cpu that is trusted with every type: what these tests compute in half exists on torch 1.8's cpu too."""

    def supports(self, dtype):
        return True


CPU = AnyType("cpu")


class Net(nn.Module):
    """[B, 6] -> [B, 4] with a parameter of every sort. Batch norm is given fp32: torch 1.8's cpu has no other."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.bn = nn.BatchNorm1d(8)
        self.slope = nn.Parameter(torch.full((8,), 0.25))
        self.out = nn.Linear(8, 4, bias=False)
        self.register_buffer("shift", torch.full((4,), 0.5))

    def forward(self, x_B6):
        h_B8 = self.fc(x_B6)
        h_B8 = self.bn(h_B8.float()).to(h_B8.dtype)
        return self.out(h_B8 * self.slope) + self.shift


class Head:
    """Class centers [5, 4] with a gradient of their own, as head.head.MarginHead has them."""

    def __init__(self):
        self.weight = torch.linspace(-1, 1, 20).reshape(5, 4).requires_grad_()
        self.steps = []

    def loss(self, emb_B4, target_B5):
        return (emb_B4.float() @ self.weight.t() - target_B5).pow(2).mean()

    def found_inf(self):
        return 1 - torch.isfinite(self.weight.grad).all().float()

    def step(self, lr, inv_scale=1.0, found_inf=None):
        self.steps.append((lr, float(inv_scale), float(found_inf)))
        with torch.no_grad():
            if not float(found_inf):
                self.weight -= lr * self.weight.grad * inv_scale
        self.weight.grad = None


class Run:
    """A model, a head and an optimizer under a policy, stepped by step(seed) on a batch of that seed."""

    def __init__(self, name, scaling=STATIC, kind="auto", seed=0, device=CPU, world=ALONE, **options):
        torch.manual_seed(seed)
        self.model = Net()
        self.head = Head()
        self.precision = make_precision(name, device, world, scaling, **options)
        groups = optim.parameter_groups(self.model, "ir", 5e-4)
        self.optimizer = self.precision.prepare(
            self.model, lambda groups: optim.make_sgd(groups, 0.125, 0.9, device, kind), groups
        )

    def loss(self, seed, factor=1.0):
        generator = torch.Generator().manual_seed(seed)
        x_B6 = self.precision.cast_input(torch.randn(16, 6, generator=generator))
        target_B5 = torch.randn(16, 5, generator=generator)
        with self.precision.autocast():
            emb_B4 = self.model(x_B6)
        return self.head.loss(emb_B4, target_B5) * factor

    def step(self, seed, factor=1.0, **options):
        self.precision.backward(self.loss(seed, factor))
        self.precision.step(self.optimizer, head=self.head, **options)

    def everything(self):
        """All that a step may change, as one dict of copies."""
        state = self.precision.model_state(self.model)
        momentum = optim.optimizer_state(self.optimizer, self.precision.names)["state"]
        state.update({f"momentum of {name}": values["momentum_buffer"] for name, values in momentum.items()})
        state.update({f"half {name}": p.detach() for name, p in self.model.named_parameters()})
        state["head"] = self.head.weight.detach()
        return {name: value.clone() for name, value in state.items() if "running" not in name and "num_b" not in name}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def two_ranks(world, cases):
    """Everything that the tests on two ranks look at, in one start of the ranks."""
    return {
        "native": {case: overflow_on_rank_1(world, *case) for case in cases},
        "apex": overflow_on_rank_1_under_apex(world),
        "stuck": stuck_on_rank_1(world),
    }


def overflow_on_rank_1(world, name, kind, where):
    """Two good steps, one in which rank 1 alone overflows (in the backbone or in the head), one good one."""
    run = Run(name, LossScaling(init_loss_scaling=1024.0, decr_every_n_nan_or_inf=1), kind, world=world)
    report = []
    for seed in range(4):
        before = run.everything()
        run.precision.backward(run.loss(seed))
        if seed == 2 and world.rank == 1:
            grad = run.head.weight.grad if where == "head" else run.model.out.weight.grad
            grad[0, 0] = float("inf")
        run.precision.step(run.optimizer, head=run.head, lr=0.5)
        report.append((same(before, run.everything()), run.precision.scale, run.precision.skipped))
    return report


def overflow_on_rank_1_under_apex(world):
    sys.path.insert(0, STAND_IN)
    run = Run("O2", LossScaling(), world=world, amp_backend="apex")
    report = []
    for seed in range(4):
        before = run.everything()
        factor = float("inf") if seed == 2 and world.rank == 1 else 1.0
        run.step(seed, factor)
        report.append((same(before, run.everything()), run.precision.scale, run.precision.skipped))
    return report


def stuck_on_rank_1(world):
    """Rank 1's batches are bad for good: what every rank says when it gives up."""
    run = Run("O0", world=world, patience=3)
    factor = float("nan") if world.rank == 1 else 1.0
    before = run.everything()
    try:
        for seed in range(6):
            run.step(seed, factor, diagnose=lambda: first_non_finite(run.model, lambda: run.loss(0, factor)))
    except PrecisionError as error:
        return str(error), seed, same(before, run.everything())
