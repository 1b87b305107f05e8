"""The margin loss in plain eager torch with autograd: the specification. It holds the B x R logits several times."""

from __future__ import annotations

import torch

from head.ops import HeadOp, LossResult, full_precision, target_values


def unit_rows(rows_ND: torch.Tensor) -> torch.Tensor:
    """Rows of length one; a row of zeros, which has no direction, stays zeros with zero gradient."""
    norm_N1 = rows_ND.norm(dim=1, keepdim=True)
    zero_N1 = norm_N1 == 0
    inverse_N1 = torch.where(zero_N1, torch.ones_like(norm_N1), norm_N1).reciprocal()
    return rows_ND * torch.where(zero_N1, torch.zeros_like(inverse_N1), inverse_N1)


def loss(emb_BD, rows, column_B, spec, world) -> LossResult:
    loss_B, top1_B, top5_B = _Reference.apply(emb_BD, rows, column_B, spec, world)
    return LossResult(loss_B, top1_B, top5_B if spec.top5 else None)


class _Reference(torch.autograd.Function):
    """Autograd over `eager_loss`, with its backward as free of the caller's autocast as its forward."""

    @staticmethod
    def forward(ctx, emb_BD, rows, column_B, spec, world):
        weight_RD = rows.read(0, rows.count).detach().to(rows.work_dtype).requires_grad_()
        emb_BD = emb_BD.detach().requires_grad_()
        with torch.set_grad_enabled(ctx.needs_input_grad[0]), full_precision(emb_BD.device):
            loss_B, top1_B, top5_B = eager_loss(emb_BD, weight_RD, column_B, spec, world)
        ctx.rows, ctx.graph = rows, (loss_B, [emb_BD, weight_RD])
        ctx.mark_non_differentiable(top1_B, top5_B)
        return loss_B.detach(), top1_B, top5_B

    @staticmethod
    def backward(ctx, grad_B, _top1, _top5):
        loss_B, leaves = ctx.graph
        with full_precision(grad_B.device):
            grad_BD, grad_RD = torch.autograd.grad(loss_B, leaves, grad_B)
        rows, ctx.graph = ctx.rows, None  # the caller may hold the loss for longer than the logits are worth
        rows.guard(torch.isfinite(grad_RD).all() & torch.isfinite(grad_BD).all())
        with torch.no_grad():
            rows.take_gradient(grad_RD)
        return grad_BD, None, None, None, None


def eager_loss(emb_BD, weight_RD, column_B, spec, world):
    norm_B = emb_BD.detach().norm(dim=1)
    if spec.normalise:
        cos_BR = (unit_rows(emb_BD) @ unit_rows(weight_RD).T).clamp(-1, 1)
    else:
        cos_BR = emb_BD @ weight_RD.T
    own_B = column_B >= 0
    column_B1 = column_B.clamp(min=0)[:, None]
    target_B = cos_BR.gather(1, column_B1).squeeze(1)
    known_B = target_values(own_B, target_B.detach(), world)
    value_B, slope_B = spec.margin(known_B, norm_B)
    # a term of value zero carries the slope: the margin's value and slope are what the specification gives
    value_B = value_B + torch.where(own_B, slope_B * (target_B - target_B.detach()), torch.zeros_like(value_B))
    # how many classes are at least as good as the target, itself left out
    better_B = world.all_reduce_((cos_BR.detach() >= known_B[:, None]).sum(1) - own_B.to(torch.int64))

    if spec.filter_above:
        cos_BR = cos_BR.masked_fill(cos_BR.detach() > spec.filter_above, 0)
    in_place_B1 = torch.where(own_B[:, None], value_B[:, None], cos_BR.gather(1, column_B1))
    lse_B = torch.logsumexp(spec.s * cos_BR.scatter(1, column_B1, in_place_B1), dim=1)
    if world.size > 1:
        # the other ranks' share is a constant here: their rows are theirs
        lse_NB = world.all_gather(lse_B.detach()[None])
        lse_NB[world.rank] = -float("inf")
        lse_B = torch.logaddexp(lse_B, torch.logsumexp(lse_NB, dim=0))
    return lse_B - spec.s * value_B, better_B < 1, better_B < 5


OP = HeadOp("reference", loss)
