"""The margin loss that never holds its logits: a walk over the classes, forward and again backward.

With c = cosines, z = s c, p = exp(z - lse), g the loss's incoming gradient (HEAD of the maths: arXiv 1801.07698 for the
margin, and the softmax's derivative):
    forward   m, Σ exp(z - m) over the columns without the target, with m the running maximum; the target's own logit
              s * margin(c_y) joins afterwards, O(B). (Correcting a plain softmax afterwards cancels in float32.)
    backward  G = s g p, on the target s g (p - 1) slope;  Ŵ, x̂ unit rows
              dx = (I - x̂ x̂ᵀ) (G Ŵ) / |x|         dW_j = (Σ_i G_ij x̂_i - Ŵ_j Σ_i G_ij c_ij) / |W_j|
              The second sum is the projection Ŵ_j (Ŵ_j · dŴ_j): no normalised W is ever stored.
Memory beside the rows: two [B, chunk] buffers and [R] inverse norms. `rows` takes each chunk's gradient as it comes, so
that it can be applied at once and dropped.
"""

from __future__ import annotations

import functools
import math

import torch

from head.ops import HeadOp, LossResult, accumulate_dtype, full_precision, target_values
from runtime.errors import ModelError

# Bytes of a chunk's buffers: on a CPU they should stay in the cache, an accelerator wants large products.
CHUNK_BYTES = {"cpu": 8 * 2**20}
CHUNK_BYTES_ACCELERATOR = 256 * 2**20


def chunk_rows(batch: int, dim: int, device_type: str, rows: int) -> int:
    """How many classes a step of the walk takes."""
    budget = CHUNK_BYTES.get(device_type, CHUNK_BYTES_ACCELERATOR)
    fit = budget // (4 * (2 * batch + 2 * dim))
    return max(1, min(rows, max(256, fit // 64 * 64)))


# float16 keeps p down to 6e-8 / BOOST; the target's p - 1 times its slope is cut off where it would leave its range.
BOOST = {torch.float16: 1024.0}
LOW_LIMIT = 32768.0


def operand_dtype(wanted: torch.dtype, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What the matrix products' operands are rounded to on a device.

    On a CPU nothing: a float32 product is as fast. bfloat16 only where products come in float32: a logit of 64 rounded
    to bfloat16 is off by up to 0.1; float16, off by 0.02, is what such devices give everyone."""
    if device.type == "cpu" or wanted not in (torch.float16, torch.bfloat16):
        return dtype
    return dtype if wanted == torch.bfloat16 and not _wide_products(device) else wanted


def loss(emb_BD, rows, column_B, spec, world) -> LossResult:
    loss_B, top1_B, top5_B = MarginLoss.apply(emb_BD, rows, column_B, spec, world, Walk)
    return LossResult(loss_B, top1_B, top5_B if spec.top5 else None)


class MarginLoss(torch.autograd.Function):
    """The loss by one kind of walk, `Walk` or a subclass."""

    @staticmethod
    def forward(ctx, emb_BD, rows, column_B, spec, world, kind):
        with full_precision(emb_BD.device):
            walk = kind(emb_BD, rows, column_B, spec)
            loss_B, top1_B, top5_B = walk.forward(world)
        ctx.walk, ctx.version = walk, rows.version
        ctx.mark_non_differentiable(top1_B, top5_B)
        return loss_B, top1_B, top5_B

    @staticmethod
    def backward(ctx, grad_B, _top1, _top5):
        if ctx.walk.rows.version != ctx.version:
            raise ModelError(
                "the class centers were updated between this forward and its backward: call backward "
                "before step(), and do not accumulate gradients with the update inside backward"
            )
        with torch.no_grad(), full_precision(grad_B.device):
            return ctx.walk.backward(grad_B), None, None, None, None, None


class Walk:
    """One batch against one set of rows: what forward leaves for backward is [B, D], [B] and [R] in size."""

    def __init__(self, emb_BD, rows, column_B, spec):
        self.spec, self.rows, self.column_B = spec, rows, column_B
        self.dtype = accumulate_dtype(emb_BD.dtype)
        emb_BD = emb_BD.detach().to(self.dtype)
        self.norm_B = emb_BD.norm(dim=1)
        self.inv_norm_B = _inverse(self.norm_B) if spec.normalise else torch.ones_like(self.norm_B)
        self.unit_BD = emb_BD * self.inv_norm_B[:, None]
        batch, dim = emb_BD.shape
        self.chunk = chunk_rows(batch, dim, emb_BD.device.type, rows.count)
        self.inv_norm_R = emb_BD.new_empty(rows.count, dtype=self.dtype) if spec.normalise else None
        self.operand = operand_dtype(spec.operand, emb_BD.device, self.dtype)
        self.low = self.operand != self.dtype
        if self.low:
            self.left_BD = self.unit_BD.to(self.operand)
            # of the rounded row the length is not quite 1 any more
            length_B = self.left_BD.to(self.dtype).norm(dim=1) if spec.normalise else torch.ones_like(self.norm_B)
            self.left_scale_B = spec.s * _inverse(length_B)
        else:
            self.left_BD = self.unit_BD * spec.s

    def _chunks(self):
        for start in range(0, self.rows.count, self.chunk):
            yield start, min(start + self.chunk, self.rows.count)

    def _buffer(self):
        return self.unit_BD.new_empty(self.unit_BD.shape[0] * self.chunk)

    def _operand(self, stored_KD, start, stop):
        """A chunk's right operand. In low precision its rows have length one, so that no product leaves float16's
        range; in full precision they stay as they are, and the products are divided by their length."""
        if not self.low:
            return stored_KD.to(self.dtype)
        if not self.spec.normalise:
            return stored_KD.to(self.operand)
        return (stored_KD * self.inv_norm_R[start:stop, None]).to(self.operand)

    def _logits(self, weight_KD, start, stop, flat):
        """s * cosines of a chunk, [B, K], in the buffer."""
        z_BK = flat[: flat.shape[0] // self.chunk * (stop - start)].view(-1, stop - start)
        _product(self.left_BD, weight_KD.t(), z_BK)
        if self.low:
            z_BK.mul_(self.left_scale_B[:, None])
        elif self.spec.normalise:
            z_BK.mul_(self.inv_norm_R[start:stop])
        return z_BK

    def _target(self):
        """The target's cosine (or product), [B], by itself in full precision; meaningful where this rank owns it."""
        weight_BD = self.rows.take(self.column_B.clamp(min=0)).to(self.dtype)
        if self.spec.normalise:
            weight_BD = weight_BD * _inverse(weight_BD.norm(dim=1))[:, None]
            return (self.unit_BD * weight_BD).sum(1).clamp(-1, 1)
        return (self.unit_BD * weight_BD).sum(1)

    def forward(self, world):
        spec, own_B = self.spec, self.column_B >= 0
        target_B = target_values(own_B, self._target(), world)
        value_B, self.slope_B = spec.margin(target_B, self.norm_B)
        logit_B = spec.s * value_B
        top_B, sum_B, best_B, better_B = self.scan(spec.s * target_B)
        # the target joins on the rank that holds it
        top_own_B = torch.where(own_B, torch.maximum(top_B, logit_B), top_B)
        shared = world.all_reduce_(torch.stack([top_own_B, best_B]), op="max")
        all_top_B, best_B = shared[0], shared[1]
        sum_B = sum_B * (top_B - all_top_B).exp()
        sum_B = sum_B + torch.where(own_B, (logit_B - all_top_B).exp(), torch.zeros_like(sum_B))
        shared = world.all_reduce_(torch.stack([sum_B, better_B]))
        self.lse_B = shared[0].log() + all_top_B
        self.logit_B = logit_B
        return self.lse_B - logit_B, best_B < spec.s * target_B, shared[1] < 5

    def scan(self, plain_B):
        """Over all columns but the target's: the largest logit, the sum of exp(logit - that), the largest before
        filtering, and (with top5) how many reach the target's plain logit plain_B. Fills inv_norm_R."""
        spec = self.spec
        # finite, so that a chunk with no other column than the target's gives no inf - inf
        top_B = torch.full_like(plain_B, torch.finfo(self.dtype).min / 4)
        sum_B, better_B = torch.zeros_like(plain_B), torch.zeros_like(plain_B)
        best_B = torch.full_like(plain_B, -float("inf"))
        flat = self._buffer()
        for start, stop in self._chunks():
            stored_KD = self.rows.read(start, stop)
            if spec.normalise:
                self.inv_norm_R[start:stop] = _inverse(stored_KD.to(self.dtype).norm(dim=1))
            z_BK = self._logits(self._operand(stored_KD, start, stop), start, stop, flat)
            _put(z_BK, self.column_B - start, -float("inf"))
            chunk_top_B = z_BK.amax(1)
            best_B = torch.maximum(best_B, chunk_top_B)
            if spec.top5:
                better_B += (z_BK >= plain_B[:, None]).sum(1)
            if spec.filter_above:
                z_BK.masked_fill_(z_BK > spec.s * spec.filter_above, 0)
                chunk_top_B = z_BK.amax(1)
            new_top_B = torch.maximum(top_B, chunk_top_B)
            sum_B.mul_((top_B - new_top_B).exp_()).add_(z_BK.sub_(new_top_B[:, None]).exp_().sum(1))
            top_B = new_top_B
        return top_B, sum_B, best_B, better_B

    def backward(self, grad_B):
        spec, rows = self.spec, self.rows
        grad_B = grad_B.to(self.dtype)
        finite = torch.isfinite(self.lse_B).all() & torch.isfinite(self.unit_BD).all() & torch.isfinite(grad_B).all()
        rows.guard(finite)
        if rows.at_once:  # a batch that is not finite must not reach centers that are updated here and now
            for name in ("unit_BD", "left_BD", "lse_B", "logit_B", "slope_B"):
                setattr(self, name, getattr(self, name).masked_fill(~finite, 0))
            grad_B = grad_B.masked_fill(~finite, 0)
        # s * g are in the [B, D] operands, not in the [B, K] buffers; the buffers hold boost * p
        boost = BOOST.get(self.operand, 1.0)
        shift_B = self.lse_B - math.log(boost)
        minus_B = boost * torch.expm1(self.logit_B - self.lse_B) * self.slope_B
        peak = grad_B.abs().max()
        if self.low:
            minus_B = minus_B.clamp(-LOW_LIMIT, LOW_LIMIT)
            right_BD = (self.unit_BD * (grad_B * _inverse(peak))[:, None]).to(self.operand)
        else:
            right_BD = self.unit_BD * (spec.s * grad_B)[:, None]
        grad_unit_BD = torch.zeros_like(self.unit_BD)
        buffers = self._buffer(), self._buffer()
        for start, stop in self._chunks():
            weight_KD, p_BK, along_K = self.probabilities(start, stop, grad_B, shift_B, minus_B, buffers)
            scale_K = None
            if self.low:
                scale_K = (peak * (spec.s / boost)).expand(stop - start)
            if spec.normalise:
                inv_K = self.inv_norm_R[start:stop]
                along_K.mul_(inv_K).mul_(inv_K).div_(boost)
                scale_K = scale_K * inv_K if self.low else None
            _add_product(p_BK, weight_KD, grad_unit_BD)
            _product(p_BK.t(), right_BD, rows.begin(start, stop))
            rows.end(start, stop, scale_K, along_K)
        grad_unit_BD.mul_((grad_B * (spec.s / boost))[:, None])
        if spec.normalise:
            along_B1 = (grad_unit_BD * self.unit_BD).sum(1, keepdim=True)
            grad_unit_BD.sub_(self.unit_BD * along_B1).mul_(self.inv_norm_B[:, None])
        if rows.at_once:  # but whoever looks at the gradient has to see it
            grad_unit_BD.masked_fill_(~finite, float("nan"))
        return grad_unit_BD

    def probabilities(self, start, stop, grad_B, shift_B, minus_B, buffers):
        """A chunk's right operand [K, D]; exp(logit - shift_B), or minus_B on the target and 0 where filtered, as left
        operand [B, K] (in full precision divided by the rows' lengths); and its Σ_i g_i logit p, [K] or None."""
        spec = self.spec
        weight_KD = self._operand(self.rows.read(start, stop), start, stop)
        z_BK = self._logits(weight_KD, start, stop, buffers[0])
        p_BK = buffers[1][: z_BK.numel()].view_as(z_BK)
        torch.sub(z_BK, shift_B[:, None], out=p_BK).exp_()
        if spec.filter_above:
            p_BK.masked_fill_(z_BK > spec.s * spec.filter_above, 0)
        _put(p_BK, self.column_B - start, minus_B)
        if not spec.normalise:
            return weight_KD, p_BK.to(self.operand), None
        along_K = grad_B @ z_BK.mul_(p_BK)
        if not self.low:
            p_BK.mul_(self.inv_norm_R[start:stop])
        return weight_KD, p_BK.to(self.operand), along_K


def _inverse(norm):
    """1 / norm; 0 for a row of zeros, which has no direction and gets no gradient. What is not finite stays so."""
    return torch.where(norm == 0, torch.zeros_like(norm), norm.reciprocal())


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
    elif _wide_products(out.device):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def _add_product(a, b, out):
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif _wide_products(out.device):
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:
        out.add_(a @ b)


@functools.cache
def _wide_products(device: torch.device) -> bool:
    """Whether products of half precision operands can be had in float32 there (torch 2.8 on CUDA)."""
    try:
        one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        return bool((torch.mm(one, one, out_dtype=torch.float32) == 16).all())
    except (RuntimeError, TypeError):
        return False


OP = HeadOp("chunked", loss)
