"""The margin loss over this rank's rows of class centers: one signature, several implementations.

    op(emb_BD, rows, column_B, spec, world) -> LossResult

emb_BD: the whole batch (all ranks'), float32 or float64, not normalised.
rows: the centers that take part, [R, D], and where their gradient goes: `head.centers.Rows`.
column_B: int64, the target's place among those rows; -1 where another rank holds it.
spec: the loss, `LossSpec`.   world: the ranks that share the classes.

Every rank gets the same loss. Backward gives emb_BD the part of the gradient that comes from this rank's rows (the sum
over the ranks is the whole), and hands the rows theirs. Norms, softmax and sums are float32 (float64 for float64)
whatever is stored and under any autocast.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch

from runtime.errors import ModelError


@dataclass(frozen=True)
class LossSpec:
    """margin: (target_B, norm_B) -> (value_B, slope_B), the same on every rank.
    s: scale of the logits.   normalise: cosines, or else plain products.
    filter_above: a cosine with another class above this counts as 0 and gets no gradient: noisy labels (0 = off).
    operand: dtype of the matrix products' operands on devices that gain from it; sums stay float32.
    top5: count too whether the target is among the five best."""

    margin: Callable
    s: float = 64.0
    normalise: bool = True
    filter_above: float = 0.0
    operand: torch.dtype = torch.float32
    top5: bool = False


class LossResult(NamedTuple):
    """loss_B: per sample. top1_B, top5_B: bool, by the logits without margin; a tie counts as a miss."""

    loss_B: torch.Tensor
    top1_B: torch.Tensor
    top5_B: torch.Tensor | None


@dataclass(frozen=True)
class HeadOp:
    """One implementation. reason_against(device) -> why it cannot run there, or None. update_rows: its own SGD on
    rows, if it has one (`head.centers.Rows.update`)."""

    name: str
    run: Callable
    reason_against: Callable = lambda device: None
    update_rows: Callable | None = None


def _operators() -> dict:
    from head.ops import chunked, reference, triton

    return {op.name: op for op in (chunked.OP, triton.OP, reference.OP)}


def choose_op(name: str, device: torch.device) -> HeadOp:
    """The implementation called `name`; "auto" takes the first that runs on the device.

    Raises ModelError for a name that does not exist or that cannot run there.
    """
    operators = _operators()
    if name == "auto":
        return next(op for op in operators.values() if op.reason_against(device) is None)
    if name not in operators:
        raise ModelError(f"head_op '{name}': choose from auto, {', '.join(operators)}")
    reason = operators[name].reason_against(device)
    if reason:
        raise ModelError(f"head_op '{name}' cannot run on {device.type}: {reason}; choose auto")
    return operators[name]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def full_precision(device: torch.device):
    """No autocast inside, whatever the caller's policy is."""
    if hasattr(torch, "autocast"):
        with torch.autocast(device.type, enabled=False):
            yield
    else:  # torch < 1.10 has autocast on CUDA only
        with torch.cuda.amp.autocast(enabled=False):
            yield


def target_values(own_B: torch.Tensor, target_B: torch.Tensor, world) -> torch.Tensor:
    """Each target's value from the rank that holds it, on every rank; nan where no rank does: a label that does not
    exist must not look like a loss."""
    found_B = world.all_reduce_(torch.where(own_B, target_B, torch.full_like(target_B, -float("inf"))), op="max")
    return torch.where(found_B == -float("inf"), torch.full_like(found_B, float("nan")), found_B)
