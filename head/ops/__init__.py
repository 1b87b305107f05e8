"""The margin loss over this rank's class centers in two passes over them: one signature, several implementations.

    first(emb_BD, rows, column_B, spec, world, learn) -> FirstPass      loss and the embeddings' whole gradient
    second(kept, rows, spec, sink)                                      the centers' gradient, a chunk of rows at a time

`margin_loss` joins them to autograd: forward makes the first pass, backward multiplies by the incoming gradient and
visits no class, and what the second pass needs goes to `keep`, for `step` to make it: then the gradient of a chunk of
rows is there, is used up, and dropped. Ops get tensors and a sink, and know nothing of who owns them.

Every rank gets the same loss, and the part of the embeddings' gradient that comes from its own rows (the sum over the
ranks is the whole). Norms, softmax and sums are float32 (float64 for float64) whatever is stored, under any autocast.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch

from runtime.errors import ModelError


@dataclass(frozen=True)
class LossSpec:
    """margin: (target_B, norm_B) -> (value_B, derivative_B), the same on every rank.
    s: scale of the logits.   normalise: cosines, or else plain products.
    filter_above: a cosine with another class above this counts as 0 and gets no gradient: noisy labels (0 = off).
    operand: dtype of the matrix products' operands on devices that gain from it; sums stay float32.
    top5: count too whether the target is among the five best.
    skip: leave out products of tiles whose probabilities all lie below what half operands resolve (Triton)."""

    margin: Callable
    s: float = 64.0
    normalise: bool = True
    filter_above: float = 0.0
    operand: torch.dtype = torch.float32
    top5: bool = False
    skip: bool = True


class Rows(NamedTuple):
    """The centers that take part. weight_CW: all of the rank's, as stored. inverse_C: 1 / their length, 0 for a row of
    zeros (None: products, not cosines). index_R: int64, ascending, distinct; None is all of them."""

    weight_CW: torch.Tensor
    inverse_C: torch.Tensor | None
    index_R: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return self.weight_CW.shape[0] if self.index_R is None else self.index_R.shape[0]

    def where(self, start: int, stop: int):
        """Their places in the tables."""
        return slice(start, stop) if self.index_R is None else self.index_R[start:stop]

    def read(self, start: int, stop: int) -> tuple:
        """([stop - start, W] as stored, [stop - start] inverse lengths or None); views where they can be."""
        where = self.where(start, stop)
        inverse_K = None if self.inverse_C is None else rows_of(self.inverse_C, where)
        return rows_of(self.weight_CW, where), inverse_K

    def take(self, place_B: torch.Tensor) -> tuple:
        """The same for places among these rows."""
        where = place_B if self.index_R is None else self.index_R[place_B]
        return rows_of(self.weight_CW, where), None if self.inverse_C is None else self.inverse_C[where]


@dataclass
class Kept:
    """What a first pass leaves for the second: O(B D). unit_BD: the embeddings' directions. lse_B: of all logits.
    minus_B: (p - 1) * the margin's derivative at the target. column_B: the target's place among the rows, -1 where
    another rank holds it. grad_B: the loss's incoming gradient; None before backward. member_NR and part_B: with
    several forward passes over different samples, which rows were in which, and each image's pass."""

    unit_BD: torch.Tensor
    lse_B: torch.Tensor
    minus_B: torch.Tensor
    column_B: torch.Tensor
    grad_B: torch.Tensor | None = None
    member_NR: torch.Tensor | None = None
    part_B: torch.Tensor | None = None

    def members(self, start: int, stop: int):
        """[B, stop - start], 1 where a row took part in the image's pass; None where all did."""
        return None if self.member_NR is None else self.member_NR[:, start:stop][self.part_B]


class FirstPass(NamedTuple):
    """loss_B: per sample. top1_B, top5_B: bool, by the logits without margin; a tie counts as a miss. grad_BD: of each
    sample's loss with respect to its embedding, and kept; both None without `learn`."""

    loss_B: torch.Tensor
    top1_B: torch.Tensor
    top5_B: torch.Tensor
    grad_BD: torch.Tensor | None
    kept: Kept | None


class LossResult(NamedTuple):
    loss_B: torch.Tensor
    top1_B: torch.Tensor
    top5_B: torch.Tensor | None


@dataclass(frozen=True)
class HeadOp:
    """One implementation. reason_against(device) -> why it cannot run there, or None. second's `sink(start, stop,
    grad_KW, scale_K=None, along_K=None, weight_KW=None)` takes the gradient scale_K * grad_KW - along_K * weight of
    rows start:stop (None: 1 and 0), and may write into grad_KW; weight_KW are those rows, where they have been read
    anyway. update_rows: its own SGD on rows, if it has one, which takes the gradient's part along the row off by itself
    (`head.centers.Update`)."""

    name: str
    first: Callable
    second: Callable
    reason_against: Callable = lambda device: None
    update_rows: Callable | None = None


def _operators() -> dict:
    from head.ops import chunked, reference, triton

    return {op.name: op for op in (chunked.OP, triton.OP, reference.OP)}


def find_op(name: str, device: torch.device) -> HeadOp:
    """Raises ModelError for a name that does not exist or that cannot run there."""
    operators = _operators()
    if name not in operators:
        raise ModelError(f"head_op '{name}': choose from auto, {', '.join(operators)}")
    reason = operators[name].reason_against(device)
    if reason:
        raise ModelError(f"head_op '{name}' cannot run on {device.type}: {reason}; choose auto")
    return operators[name]


def candidates(device: torch.device) -> list:
    """What `auto` may take there; the first where there is nothing to compare."""
    return [op for op in _operators().values() if op.name != "reference" and op.reason_against(device) is None]


def margin_loss(op: HeadOp, emb_BD, rows: Rows, column_B, spec: LossSpec, world, keep: Callable) -> LossResult:
    """emb_BD: the whole batch (all ranks'), float32 or float64, not normalised. column_B: int64, the target's place
    among the rows; -1 where another rank holds it. world: the ranks that share the classes. keep(kept): called by the
    first backward through this loss; later ones add to its grad_B."""
    loss_B, top1_B, top5_B = _MarginLoss.apply(emb_BD, rows, column_B, spec, world, keep, op)
    return LossResult(loss_B, top1_B, top5_B if spec.top5 else None)


class _MarginLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, emb_BD, rows, column_B, spec, world, keep, op):
        with full_precision(emb_BD.device):
            result = op.first(emb_BD.detach(), rows, column_B, spec, world, ctx.needs_input_grad[0])
        ctx.grad_BD, ctx.kept, ctx.keep = result.grad_BD, result.kept, keep
        ctx.weight, ctx.version = rows.weight_CW, rows.weight_CW._version
        ctx.mark_non_differentiable(result.top1_B, result.top5_B)
        return result.loss_B, result.top1_B, result.top5_B

    @staticmethod
    def backward(ctx, grad_B, _top1, _top5):
        if ctx.weight._version != ctx.version:
            raise ModelError(
                "the class centers were updated between this forward and its backward: call backward before step()"
            )
        kept, grad_B = ctx.kept, grad_B.detach().to(ctx.grad_BD.dtype)
        if kept.grad_B is None:
            kept.grad_B = grad_B
            ctx.keep(kept)
        else:
            kept.grad_B = kept.grad_B + grad_B
        return ctx.grad_BD * grad_B[:, None], None, None, None, None, None, None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of(data: torch.Tensor, where) -> torch.Tensor:
    """data[where]: a view for a slice; for row numbers a copy, by the quicker of torch's two ways."""
    return data[where] if isinstance(where, slice) else data.index_select(0, where)


def inverse_of(length: torch.Tensor) -> torch.Tensor:
    """1 / length; 0 for a row (next to) zero, which has no direction and gets no gradient. nan stays."""
    none = length < 1e-30
    return torch.where(none, torch.zeros_like(length), torch.where(none, torch.ones_like(length), length).reciprocal())


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
    nobody = torch.finfo(target_B.dtype).min
    found_B = world.all_reduce_(torch.where(own_B, target_B, torch.full_like(target_B, nobody)), op="max")
    # Arithmetic makes the nan, on those rows alone: chips that saturate remember any, and the step is skipped
    found_B = found_B + (found_B == nobody).to(found_B.dtype) * nobody
    return found_B + (found_B - found_B)
