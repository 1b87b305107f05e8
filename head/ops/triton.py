"""The chunked walk with Triton kernels for what plain torch does in many passes over memory.

- forward: one kernel has a tile's product, norms, running maximum and sum in registers; no logits reach memory;
- backward: one kernel writes a chunk's p straight from its product; the two gradient products stay the vendor's;
- update: one kernel takes a chunk's gradient, projects it, and does SGD on weight and momentum as they are stored.
Centers of one draw are read in place, without a gathered copy.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from head.ops import HeadOp, LossResult
from head.ops.chunked import MarginLoss, Walk
from head.storage import BLOCK, DROPPED_BITS, VELOCITY_NOISE, ByteTable, mix
from runtime.errors import ModelError

BLOCK_B, BLOCK_K, BLOCK_D = 64, 128, 64
SCAN_TILES = 16  # tiles of rows that one program walks


def interpreted() -> bool:
    """Whether Triton's interpreter is switched on: slow, on any device, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reason_against(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and not interpreted():
        return "its kernels are for cuda"
    return None


def loss(emb_BD, rows, column_B, spec, world) -> LossResult:
    if emb_BD.dtype == torch.float64:
        raise ModelError("head_op 'triton' computes in float32: choose chunked for float64")
    loss_B, top1_B, top5_B = MarginLoss.apply(emb_BD, rows, column_B, spec, world, _TritonWalk)
    return LossResult(loss_B, top1_B, top5_B if spec.top5 else None)


class _TritonWalk(Walk):
    """`Walk` with its passes over the logits in kernels."""

    def __init__(self, emb_BD, rows, column_B, spec):
        super().__init__(emb_BD, rows, column_B, spec)
        if not self.low:  # both kernels scale the product, whatever the operands
            self.left_BD, self.left_scale_B = self.unit_BD, torch.full_like(self.norm_B, spec.s)
        self.left_BD, self.column_B = self.left_BD.contiguous(), column_B.contiguous()

    def _arguments(self):
        """What both walks' kernels take in the same way."""
        weight, index_R = self.rows.centers.weight, self.rows.index_R
        tensors = (
            self.left_BD,
            self.left_scale_B,
            weight,
            self.column_B if index_R is None else index_R,
            self.left_scale_B if self.inv_norm_R is None else self.inv_norm_R,
            self.column_B,
        )
        exact = self.operand != torch.float32 or not torch.backends.cuda.matmul.allow_tf32
        flags = dict(
            GATHER=index_R is not None,
            NORMALISE=self.spec.normalise,
            FILTER=bool(self.spec.filter_above),
            WIDEN=interpreted() and self.operand == torch.bfloat16,
            PRECISION="ieee" if exact else "tf32",
            BLOCK_B=BLOCK_B,
            BLOCK_K=BLOCK_K,
            BLOCK_D=BLOCK_D,
        )
        return tensors, flags

    def scan(self, plain_B):
        from head.ops.triton_kernels import scan_kernel

        batch, dim = self.unit_BD.shape
        programs = -(-self.rows.count // (BLOCK_K * SCAN_TILES))
        top, total, best, better = (plain_B.new_zeros(programs, batch) for _ in range(4))
        tensors, flags = self._arguments()
        scan_kernel[(-(-batch // BLOCK_B), programs)](
            *tensors,
            plain_B.contiguous(),
            top,
            total,
            best,
            better,
            batch,
            self.rows.count,
            dim,
            self.spec.s * self.spec.filter_above,
            SCAN_TILES,
            TOP5=self.spec.top5,
            **flags,
        )
        top_B = top.amax(0)
        return top_B, (total * (top - top_B).exp()).sum(0), best.amax(0), better.sum(0)

    def probabilities(self, start, stop, grad_B, shift_B, minus_B, buffers):
        from head.ops.triton_kernels import probability_kernel

        batch, dim = self.unit_BD.shape
        count, tiles = stop - start, -(-batch // BLOCK_B)
        p_BK = buffers[0].new_empty(batch, count, dtype=self.operand)
        along = buffers[0].new_empty(tiles, count)
        tensors, flags = self._arguments()
        probability_kernel[(tiles, -(-count // BLOCK_K))](
            *tensors,
            shift_B.contiguous(),
            minus_B.contiguous(),
            grad_B.contiguous(),
            p_BK,
            along,
            start,
            batch,
            count,
            dim,
            self.spec.s * self.spec.filter_above,
            DIVIDE=self.spec.normalise and not self.low,
            **flags,
        )
        return self._right(start, stop), p_BK, along.sum(0) if self.spec.normalise else None

    def _right(self, start, stop):
        """The rows as the gradient product's operand: `Walk._operand` in one pass."""
        if not self.low and self.rows.index_R is None:
            return self.rows.read(start, stop).to(self.operand)
        from head.ops.triton_kernels import unit_rows_kernel

        count, dim = stop - start, self.unit_BD.shape[1]
        tensors, flags = self._arguments()
        _, _, weight, index, inverse, _ = tensors
        right_KD = self.unit_BD.new_empty(count, dim, dtype=self.operand)
        unit_rows_kernel[(-(-count // BLOCK_K), -(-dim // BLOCK_D))](
            weight,
            index,
            inverse,
            right_KD,
            start,
            count,
            dim,
            GATHER=flags["GATHER"],
            NORMALISE=self.spec.normalise and self.low,
            BLOCK_K=BLOCK_K,
            BLOCK_D=BLOCK_D,
        )
        return right_KD

    def _buffer(self):
        return self.unit_BD.new_empty(0)  # nothing but its dtype and device is wanted


def update_rows(grad_KW, table, where, velocity, place, scale_K, along_K, update, first_row) -> None:
    """`Rows.update`'s arithmetic on tables: table at `where`, velocity (or None) at `place`. grad_KW is used up."""
    from head.ops.triton_kernels import update_kernel

    count, width = grad_KW.shape
    of_bytes = isinstance(velocity, ByteTable)
    inv_scale, keep = update.inv_scale, update.keep
    if not torch.is_tensor(inv_scale):
        inv_scale = None if inv_scale == 1 else grad_KW.new_tensor(inv_scale)

    def pointer(tensor, dtype=None):
        return grad_KW if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()  # unread where None

    def place_of(where):
        return (grad_KW, where.start) if isinstance(where, slice) else (where, 0)

    rows_per_program = 32
    update_kernel[(-(-count // rows_per_program), -(-width // BLOCK))](
        grad_KW,
        table.data,
        *place_of(where),
        pointer(velocity and velocity.data),
        *place_of(place),
        pointer(velocity.scale if of_bytes else None),
        pointer(scale_K),
        pointer(along_K),
        pointer(inv_scale, grad_KW.dtype),
        pointer(keep, torch.int32),
        float(update.lr),
        float(update.momentum),
        float(update.weight_decay),
        first_row,
        mix(update.noise_key),
        mix(update.noise_key ^ VELOCITY_NOISE),
        count,
        width,
        velocity.scale.shape[1] if of_bytes else 0,
        WEIGHT_GATHER=not isinstance(where, slice),
        VELOCITY=0 if velocity is None else 2 if of_bytes else 1,
        VELOCITY_GATHER=not isinstance(place, slice),
        SCALE=scale_K is not None,
        ALONG=along_K is not None,
        INV_SCALE=inv_scale is not None,
        KEEP=keep is not None,
        WEIGHT_DROPPED=DROPPED_BITS.get(table.data.dtype, 0),
        VELOCITY_DROPPED=0 if velocity is None else DROPPED_BITS.get(velocity.data.dtype, 0),
        BLOCK_K=rows_per_program,
        BLOCK_D=BLOCK,
    )
    torch.autograd.graph.increment_version(table.data)  # torch does not see what a kernel writes


OP = HeadOp("triton", loss, reason_against, update_rows)
