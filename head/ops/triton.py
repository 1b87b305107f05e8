"""The two passes with Triton kernels for half operands, and the centers' SGD in one kernel for all.

- first: one kernel has a tile's product, running maximum, sum and weighted sum of rows in registers;
- second: one kernel has a tile's product, probabilities and gradient there: no logits reach memory in either;
- update: one kernel takes a chunk's gradient, projects it, and does SGD on weight, momentum and inverse length as they
  are stored, momentum also in pinned host memory, which it addresses.
A tile whose probabilities all lie below SKIP_BELOW adds nothing that half operands and float32 sums would show: its
second product is left out (as cut cross entropy does, arXiv 2411.09009); LossSpec.skip turns that off. A sum over
classes is short by at most SKIP_BELOW times their number.

float32 operands, and rows wider than a tile can be, take the chunked passes: the kernels' tiles would not fit.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from head.ops import HeadOp, rows_of
from head.ops.chunked import Chunked, Left, chunks_of
from head.storage import DROPPED_BITS, ByteTable
from runtime.errors import ModelError

WIDEST = 512
SKIP_BELOW = 2.0**-24
BOOST = 2.0**14  # of the first pass's probabilities
SPLITS = 16  # programs that share a chunk's rows, with a weighted sum each


def interpreted() -> bool:
    """Whether Triton's interpreter is switched on: slow, on any device, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reason_against(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and not interpreted():
        return "its kernels are for cuda"
    return None


def power_of_two(width: int) -> int:
    """The width of a tile: at least 16, which products need."""
    return max(16, 1 << (width - 1).bit_length())


def _launch(kernel, grid, *arguments, **flags) -> None:
    """grid: from a tile's sizes. What autotuning would try takes the interpreter too long: it gets one small tile."""
    if interpreted():
        tile = dict(BLOCK_B=16, BLOCK_K=16)
        kernel.fn[grid(tile)](*arguments, **flags, **tile)
    else:
        kernel[grid](*arguments, **flags)


class TritonPasses(Chunked):
    def first(self, emb_BD, rows, column_B, spec, world, learn):
        if emb_BD.dtype == torch.float64:
            raise ModelError("head_op 'triton' computes in float32: choose chunked for float64")
        return super().first(emb_BD, rows, column_B, spec, world, learn)

    def scan(self, left, rows, spec, plain_B, logit_B, learn):
        if not _takes(left):
            return super().scan(left, rows, spec, plain_B, logit_B, learn)
        from head.ops.triton_kernels import scan_kernel

        batch, dim = left.unit_BD.shape
        # from the target's logit on: once it is well above all others, their tiles need no second product
        top = logit_B.repeat(SPLITS, 1)
        total, better = torch.zeros_like(top), torch.zeros_like(top)
        best = torch.full_like(top, torch.finfo(top.dtype).min)
        out = top.new_zeros((SPLITS, batch, dim) if learn else (1, 1, 1))
        operand_BD, column_B = left.operand_BD.contiguous(), left.column_B.contiguous()
        for start, stop in chunks_of(left, rows):
            right_KD = self._right(left, rows, start, stop)
            per = -(-(stop - start) // (SPLITS * 64)) * 64
            _launch(
                scan_kernel,
                lambda tile: (-(-batch // tile["BLOCK_B"]), SPLITS),
                *(operand_BD, left.scale_B, right_KD, column_B, plain_B.contiguous(), top, total, best, better, out),
                *(start, batch, stop - start, dim, per),
                *(spec.s * spec.filter_above, SKIP_BELOW if spec.skip else -1.0, BOOST),
                LEARN=learn,
                FILTER=bool(spec.filter_above),
                TOP5=spec.top5,
                WIDEN=_widen(left),
                WIDTH=power_of_two(dim),
            )
        top_B = top.amax(0)
        fade = (top - top_B).exp()
        out_BD = (out * (fade / BOOST)[:, :, None]).sum(0) if learn else None
        return top_B, (total * fade).sum(0), best.amax(0), better.sum(0), out_BD

    def second(self, kept, rows, spec, sink) -> None:
        left = Left.of(kept.unit_BD, kept.column_B, spec)
        if not _takes(left):
            return super().second(kept, rows, spec, sink)
        from head.ops.triton_kernels import gradient_kernel

        batch, dim = left.unit_BD.shape
        boost, weight_B, scale, minus_B, shift_B = left.scaled(kept, spec)
        operand_BD, column_B = left.operand_BD.contiguous(), left.column_B.contiguous()
        member, part = (column_B, column_B) if kept.member_NR is None else (kept.member_NR.to(torch.int8), kept.part_B)
        for start, stop in chunks_of(left, rows):
            right_KD = self._right(left, rows, start, stop)
            grad_KD = left.unit_BD.new_empty(stop - start, dim)
            _launch(
                gradient_kernel,
                lambda tile, count=stop - start: (-(-count // tile["BLOCK_K"]),),
                *(operand_BD, left.scale_B, right_KD, column_B, shift_B, minus_B, weight_B, member, part, grad_KD),
                *(start, batch, stop - start, dim, rows.count),
                *(spec.s * spec.filter_above, SKIP_BELOW * boost if spec.skip else -1.0),
                FILTER=bool(spec.filter_above),
                MEMBER=kept.member_NR is not None,
                WIDEN=_widen(left),
                WIDTH=power_of_two(dim),
            )
            scale_K = scale.expand(stop - start)
            if spec.normalise:
                scale_K = scale_K * rows_of(rows.inverse_C, rows.where(start, stop))
            sink(start, stop, grad_KD, scale_K)

    def _right(self, left, rows, start, stop):
        """`Left.right` of a chunk in one pass."""
        from head.ops.triton_kernels import unit_rows_kernel

        dim = rows.weight_CW.shape[1]
        right_KD = left.operand_BD.new_empty(stop - start, dim)
        index = left.column_B if rows.index_R is None else rows.index_R  # unread where None
        inverse = left.unit_BD if rows.inverse_C is None else rows.inverse_C
        unit_rows_kernel[(stop - start,)](
            *(rows.weight_CW, index, inverse, right_KD, start, stop - start, dim),
            GATHER=rows.index_R is not None,
            NORMALISE=rows.inverse_C is not None,
            WIDTH=power_of_two(dim),
            num_warps=1,
        )
        return right_KD


def _takes(left) -> bool:
    return left.low and power_of_two(left.unit_BD.shape[1]) <= WIDEST


def _widen(left) -> bool:
    return interpreted() and left.operand_BD.dtype == torch.bfloat16


def update_rows(update, where, grad_KW, scale_K, momentum) -> None:
    """`head.centers.Update`'s arithmetic, with the projection, on its centers' tables in place."""
    from head.ops.triton_kernels import update_kernel

    centers, weight = update.centers, update.centers.weight
    count, width = grad_KW.shape
    gather, of_bytes = not isinstance(where, slice), isinstance(momentum, ByteTable)

    def pointer(tensor):
        return grad_KW if tensor is None else tensor  # unread where None

    update_kernel[(count,)](
        grad_KW,
        weight,
        where if gather else grad_KW,
        0 if gather else where.start,
        pointer(centers.inverse_C),
        pointer(momentum and momentum.data),
        pointer(momentum.scale if of_bytes else None),
        pointer(scale_K),
        pointer(None if update.keep is None else update.keep.to(torch.int32)),
        *(float(update.lr), float(centers.momentum_factor), float(centers.weight_decay)),
        # a row's two tables need noise of their own
        *(centers.shard.start, update.seed, update.seed ^ 0x5BD1E995, width),
        GATHER=gather,
        NORMALISE=centers.inverse_C is not None,
        MOMENTUM=0 if momentum is None else 2 if of_bytes else 1,
        SCALE=scale_K is not None,
        KEEP=update.keep is not None,
        WEIGHT_DROPPED=DROPPED_BITS.get(weight.dtype, 0),
        MOMENTUM_DROPPED=0 if momentum is None else DROPPED_BITS.get(momentum.data.dtype, 0),
        WIDTH=power_of_two(width),
    )
    torch.autograd.graph.increment_version(weight)  # torch does not see what a kernel writes


_passes = TritonPasses()
OP = HeadOp("triton", _passes.first, _passes.second, reason_against, update_rows)
