"""The margin loss that never holds its logits: two chunked passes over the classes, in plain torch.

With c = cosines, z = s c, x̂, Ŵ unit rows, y the target, g the loss's incoming gradient (margin: arXiv 1801.07698; the
running maximum as in arXiv 1805.02867, carried on to the weighted sum as attention does, arXiv 2205.14135):
    first   m, Σ exp(z - m) and O = Σ exp(z - m) Ŵ over the columns without the target, m the running maximum, the last
            two times exp(m_old - m) when it grows. The target's own logit s margin(c_y) joins afterwards, O(B D):
            (correcting a plain softmax afterwards cancels in float32)
            P = O exp(m - lse) + (p_y - 1) derivative Ŵ_y          dloss/dx = s (I - x̂ x̂ᵀ) P / |x|
    second  p = exp(z - lse), on the target (p_y - 1) derivative
            dW_j = s (Σ_i g_i p_ij x̂_i - Ŵ_j Σ_i g_i p_ij c_ij) / |W_j|
            The second sum is the projection Ŵ_j (Ŵ_j · dŴ_j).
Beside the rows there are two [B, chunk] buffers and one [chunk, D]. Evaluation leaves O out.

Half operands. exp(z - m) and p lie within 0..1; they are multiplied by a power of two so that float16 keeps the small
ones, and its range cannot be left: where products come in float32 every factor stays below 2^15. Where they come in
float16 themselves, in the first pass a row's factors sum up to at most 2^14, and |Ŵ| <= 1; in the second a column has
B factors of at most 60000 / B each, and the other operand (x̂ times g over the largest |g|) is at most 1. So no sum of a
finite batch passes 65504, not even with all of it on one wrong center.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from head.ops import FirstPass, HeadOp, Kept, accumulate_dtype, full_precision, inverse_of, target_values

# Bytes of a chunk's buffers: on a CPU they should stay in the cache, an accelerator wants large products.
CHUNK_BYTES = {"cpu": 8 * 2**20}
CHUNK_BYTES_ACCELERATOR = 256 * 2**20


def chunk_rows(batch: int, dim: int, device_type: str, rows: int) -> int:
    """How many classes a chunk has."""
    budget = CHUNK_BYTES.get(device_type, CHUNK_BYTES_ACCELERATOR)
    fit = budget // (4 * (2 * batch + 2 * dim))
    return max(1, min(rows, max(256, fit // 64 * 64)))


def operand_dtype(wanted: torch.dtype, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What the matrix products' operands are rounded to on a device.

    On a CPU nothing (but see `sum_dtype`): its half products come in half precision. bfloat16 only where products come
    in float32: a logit of 64 rounded to bfloat16 is off by up to 0.1; float16, off by 0.02, is what such devices give
    everyone."""
    if device.type == "cpu" or wanted not in (torch.float16, torch.bfloat16):
        return dtype
    return dtype if wanted == torch.bfloat16 and not wide_products(device) else wanted


def sum_dtype(wanted: torch.dtype, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What the operands of the two sums, the weighted one of rows and the centers' gradient, are rounded to where
    those of the logits are not: bfloat16 on a CPU with instructions for it, where such a product is more than twice as
    quick. It comes in bfloat16 there: of a chunk's sum as small an error as of its operands, but too large for a logit.
    """
    quick = device.type == "cpu" and dtype == torch.float32 and wanted == torch.bfloat16 and cpu_has_bfloat16()
    return wanted if quick else dtype


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 by itself (AVX512-BF16 or AMX), as far as this torch says."""
    cpu = getattr(torch, "cpu", None)
    return any(getattr(cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


@dataclass(frozen=True)
class Left:
    """The batch as the products' left operand, and how its logits come out of them: times scale_B (None: 1), and
    times the rows' inverse lengths where the right operand has rows as they are stored. sums: dtype of the operands of
    the other products."""

    unit_BD: torch.Tensor
    operand_BD: torch.Tensor
    scale_B: torch.Tensor | None
    column_B: torch.Tensor
    sums: torch.dtype

    @classmethod
    def of(cls, unit_BD, column_B, spec) -> Left:
        operand = operand_dtype(spec.operand, unit_BD.device, unit_BD.dtype)
        if operand == unit_BD.dtype:
            sums = sum_dtype(spec.operand, unit_BD.device, unit_BD.dtype)
            return cls(unit_BD, unit_BD * spec.s, None, column_B, sums)
        low_BD = unit_BD.to(operand)
        scale_B = torch.full_like(unit_BD[:, 0], spec.s)
        if spec.normalise:  # of the rounded row the length is not quite 1 any more
            scale_B *= inverse_of(low_BD.to(unit_BD.dtype).norm(dim=1))
        return cls(unit_BD, low_BD, scale_B, column_B, operand)

    @property
    def low(self) -> bool:
        return self.scale_B is not None

    def right(self, stored_KD, inverse_K) -> tuple:
        """A chunk's right operand and its rows' inverse lengths, None where they are in it: in low precision its rows
        have length one, so that no product leaves float16's range."""
        if not self.low:
            return stored_KD.to(self.unit_BD.dtype), inverse_K
        if inverse_K is not None:
            stored_KD = stored_KD * inverse_K[:, None]
        return stored_KD.to(self.operand_BD.dtype), None

    def scaled(self, kept, spec) -> tuple:
        """For the second pass, what p is multiplied by so that operands keep to their range (see the module's text);
        the images' weights beside it; the factor of the sums, None for 1; minus_B times, and lse_B less, the first."""
        if not self.low:
            return 1.0, spec.s * kept.grad_B, None, kept.minus_B, kept.lse_B
        boost, limit = _range(self.operand_BD)
        peak = kept.grad_B.abs().max()
        minus_B = boost * kept.minus_B
        if limit is not None:
            minus_B = minus_B.clamp(-limit, limit)
        weight_B = kept.grad_B * inverse_of(peak)
        return boost, weight_B, peak * (spec.s / boost), minus_B, kept.lse_B - math.log(boost)

    def logits(self, right_KD, inverse_K, flat):
        """s * cosines of a chunk, [B, K], in the buffer."""
        z_BK = flat[: self.unit_BD.shape[0] * len(right_KD)].view(-1, len(right_KD))
        _product(self.operand_BD, right_KD.t(), z_BK)
        if self.low:
            z_BK.mul_(self.scale_B[:, None])
        elif inverse_K is not None:
            z_BK.mul_(inverse_K)
        return z_BK


class Chunked:
    """The two passes; subclasses replace `scan` and `probabilities`, in which they go over the logits."""

    def first(self, emb_BD, rows, column_B, spec, world, learn) -> FirstPass:
        dtype = accumulate_dtype(emb_BD.dtype)
        emb_BD = emb_BD.to(dtype)
        norm_B, own_B = emb_BD.norm(dim=1), column_B >= 0
        inverse_B = inverse_of(norm_B) if spec.normalise else torch.ones_like(norm_B)
        left = Left.of(emb_BD * inverse_B[:, None], column_B, spec)
        # the target's cosine (or product) by itself in full precision
        weight_BD, length_B = rows.take(column_B.clamp(min=0))
        weight_BD = weight_BD.to(dtype)
        if spec.normalise:
            weight_BD = weight_BD * length_B[:, None]
        target_B = (left.unit_BD * weight_BD).sum(1)
        target_B = target_values(own_B, target_B.clamp(-1, 1) if spec.normalise else target_B, world)
        value_B, derivative_B = spec.margin(target_B, norm_B)
        logit_B = spec.s * value_B

        top_B, sum_B, best_B, better_B, out_BD = self.scan(left, rows, spec, spec.s * target_B, logit_B, learn)
        # the target joins on the rank that holds it
        top_own_B = torch.where(own_B, torch.maximum(top_B, logit_B), top_B)
        all_top_B, best_B = world.all_reduce_(torch.stack([top_own_B, best_B]), op="max")
        sum_B = sum_B * (top_B - all_top_B).exp()
        sum_B = sum_B + torch.where(own_B, (logit_B - all_top_B).exp(), torch.zeros_like(sum_B))
        sum_B, better_B = world.all_reduce_(torch.stack([sum_B, better_B]))
        lse_B = sum_B.log() + all_top_B

        grad_BD = kept = None
        if learn:
            minus_B = torch.expm1(logit_B - lse_B) * derivative_B
            out_BD.mul_((top_B - lse_B).exp()[:, None])
            out_BD.addcmul_(weight_BD, torch.where(own_B, minus_B, torch.zeros_like(minus_B))[:, None])
            if spec.normalise:
                out_BD.sub_(left.unit_BD * (out_BD * left.unit_BD).sum(1, keepdim=True))
            grad_BD = out_BD.mul_((spec.s * inverse_B)[:, None])
            kept = Kept(left.unit_BD, lse_B, minus_B, column_B)
        return FirstPass(lse_B - logit_B, best_B < spec.s * target_B, better_B < 5, grad_BD, kept)

    def scan(self, left, rows, spec, plain_B, logit_B, learn):
        """Over all columns but the target's: the largest logit, the sum of exp(logit - that), the largest before
        filtering, (with top5) how many reach the target's plain logit plain_B, and the sum of exp(..) Ŵ. The largest
        may be logit_B instead, the target's own with its margin."""
        # finite, so that a chunk with no other column than the target's gives no inf - inf
        top_B = torch.full_like(plain_B, torch.finfo(plain_B.dtype).min / 4)
        sum_B, better_B = torch.zeros_like(plain_B), torch.zeros_like(plain_B)
        best_B = torch.full_like(plain_B, torch.finfo(plain_B.dtype).min)
        out_BD = torch.zeros_like(left.unit_BD) if learn else None
        flat = _buffer(left, rows)
        for start, stop in chunks_of(left, rows):
            right_KD, inverse_K = left.right(*rows.read(start, stop))
            z_BK = left.logits(right_KD, inverse_K, flat)
            # far below any logit, and finite: some chips take inf for an overflow
            _put(z_BK, left.column_B - start, torch.finfo(z_BK.dtype).min / 2)
            chunk_top_B = z_BK.amax(1)
            best_B = torch.maximum(best_B, chunk_top_B)
            if spec.top5:
                better_B += (z_BK >= plain_B[:, None]).sum(1)
            filtered_BK = z_BK > spec.s * spec.filter_above if spec.filter_above else None
            if filtered_BK is not None:
                z_BK.masked_fill_(filtered_BK, 0)
                chunk_top_B = z_BK.amax(1)
            new_top_B = torch.maximum(top_B, chunk_top_B)
            fade_B = (top_B - new_top_B).exp_()
            chunk_sum_B = z_BK.sub_(new_top_B[:, None]).exp_().sum(1)
            sum_B.mul_(fade_B).add_(chunk_sum_B)
            top_B = new_top_B
            if learn:
                if filtered_BK is not None:
                    z_BK.masked_fill_(filtered_BK, 0)
                out_BD.mul_(fade_B[:, None])
                if left.low:
                    factor_B1 = 2.0**14 / chunk_sum_B[:, None].clamp(min=1)
                    part_BD = torch.empty_like(out_BD)
                    _product(z_BK.mul_(factor_B1).to(right_KD.dtype), right_KD, part_BD)
                    out_BD.add_(part_BD.div_(factor_B1))
                else:
                    p_BK = z_BK if inverse_K is None else z_BK.mul_(inverse_K)
                    if left.sums == p_BK.dtype:
                        out_BD.addmm_(p_BK, right_KD)
                    else:
                        out_BD.add_(p_BK.to(left.sums) @ right_KD.to(left.sums))
        return top_B, sum_B, best_B, better_B, out_BD

    def second(self, kept, rows, spec, sink) -> None:
        with full_precision(kept.unit_BD.device):
            left = Left.of(kept.unit_BD, kept.column_B, spec)
            boost, weight_B, scale, minus_B, shift_B = left.scaled(kept, spec)
            right_BD = (left.unit_BD * weight_B[:, None]).to(left.sums)
            flat = _buffer(left, rows)
            other = torch.empty_like(flat)
            width = right_BD.shape[1]
            grad = flat.new_empty(len(flat) // len(right_BD) * width)
            for start, stop in chunks_of(left, rows):
                stored_KD, inverse_K = rows.read(start, stop)
                p_BK, along_K = self.probabilities(
                    left, kept, stored_KD, inverse_K, spec, start, shift_B, minus_B, (flat, other)
                )
                grad_KD = grad[: (stop - start) * width].view(-1, width)
                _product(p_BK.t(), right_BD, grad_KD)
                scale_K = None
                if scale is not None:
                    scale_K = scale.expand(stop - start) if inverse_K is None else inverse_K * scale
                if along_K is not None:
                    along_K.mul_(inverse_K).mul_(inverse_K).div_(boost)
                sink(start, stop, grad_KD, scale_K, along_K, stored_KD)

    def probabilities(self, left, kept, stored_KD, inverse_K, spec, start, shift_B, minus_B, buffers):
        """A chunk's exp(logit - shift_B), or minus_B on the target and 0 where filtered, as left operand [B, K] (in
        full precision divided by the rows' lengths); and its Σ_i g_i logit p, [K] or None."""
        right_KD, unscaled_K = left.right(stored_KD, inverse_K)
        z_BK = left.logits(right_KD, unscaled_K, buffers[0])
        p_BK = torch.sub(z_BK, shift_B[:, None], out=buffers[1][: z_BK.numel()].view_as(z_BK)).exp_()
        if spec.filter_above:
            p_BK.masked_fill_(z_BK > spec.s * spec.filter_above, 0)
        members_BK = kept.members(start, start + len(stored_KD))
        if members_BK is not None:
            p_BK.mul_(members_BK)
        _put(p_BK, left.column_B - start, minus_B)
        along_K = None
        if spec.normalise:
            along_K = kept.grad_B @ z_BK.mul_(p_BK)
            if not left.low:
                p_BK.mul_(inverse_K)
        return p_BK.to(left.sums), along_K


def chunks_of(left, rows) -> list:
    """[(start, stop), ...]"""
    chunk = _chunk(left, rows)
    return [(start, min(start + chunk, rows.count)) for start in range(0, rows.count, chunk)]


def _chunk(left, rows) -> int:
    return chunk_rows(*left.unit_BD.shape, left.unit_BD.device.type, rows.count)


def _buffer(left, rows):
    """[B * chunk], for a chunk's logits."""
    return left.unit_BD.new_empty(len(left.unit_BD) * _chunk(left, rows))


def _range(operand_BD) -> tuple:
    """(what p is multiplied by, the largest factor allowed or None): see the module's text."""
    if operand_BD.dtype != torch.float16:
        return 1.0, None
    if wide_products(operand_BD.device):
        return 1024.0, 2.0**15
    limit = 60000.0 / len(operand_BD)
    return 2.0 ** math.floor(math.log2(min(1024.0, limit / 8))), limit


def _put(values_BK, column_B, new):
    """values[i, column[i]] = new[i] where that column lies in this chunk; without asking the host where it does."""
    inside_B = (column_B >= 0) & (column_B < values_BK.shape[1])
    column_B1 = column_B.clamp(0, values_BK.shape[1] - 1)[:, None]
    old_B1 = values_BK.gather(1, column_B1)
    new_B1 = new[:, None] if torch.is_tensor(new) else torch.full_like(old_B1, new)
    values_BK.scatter_(1, column_B1, torch.where(inside_B[:, None], new_B1, old_B1))


def _product(a, b, out):
    """out = a b, summed in out's dtype."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif wide_products(out.device):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


@functools.cache
def wide_products(device: torch.device) -> bool:
    """Whether products of half precision operands can be had in float32 there (torch 2.8 on CUDA)."""
    try:
        one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        return bool((torch.mm(one, one, out_dtype=torch.float32) == 16).all())
    except (RuntimeError, TypeError):
        return False


_chunked = Chunked()
OP = HeadOp("chunked", _chunked.first, _chunked.second)
