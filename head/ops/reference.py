"""The margin loss in plain eager torch with autograd: the specification. It holds the B x R logits several times."""

from __future__ import annotations

import torch

from head.ops import FirstPass, HeadOp, Kept, accumulate_dtype, full_precision, target_values


def unit_rows(rows_ND: torch.Tensor) -> torch.Tensor:
    """Rows of length one; a row of zeros, which has no direction, stays zeros with zero gradient."""
    norm_N1 = rows_ND.norm(dim=1, keepdim=True)
    zero_N1 = norm_N1 == 0
    inverse_N1 = torch.where(zero_N1, torch.ones_like(norm_N1), norm_N1).reciprocal()
    return rows_ND * torch.where(zero_N1, torch.zeros_like(inverse_N1), inverse_N1)


def first(emb_BD, rows, column_B, spec, world, learn) -> FirstPass:
    weight_RD = rows.read(0, rows.count)[0].to(accumulate_dtype(emb_BD.dtype))
    emb_BD = emb_BD.detach().requires_grad_()
    with torch.set_grad_enabled(learn):
        loss_B, better_B, lse_B, derivative_B, logit_B = eager_loss(emb_BD, weight_RD, column_B, spec, world)
    grad_BD = kept = None
    if learn:
        grad_BD = torch.autograd.grad(loss_B, emb_BD, torch.ones_like(loss_B))[0]
        unit_BD = unit_rows(emb_BD.detach()) if spec.normalise else emb_BD.detach()
        lse_B = lse_B.detach()
        kept = Kept(unit_BD, lse_B, torch.expm1(logit_B - lse_B) * derivative_B, column_B)
    return FirstPass(loss_B.detach(), better_B < 1, better_B < 5, grad_BD, kept)


def eager_loss(emb_BD, weight_RD, column_B, spec, world):
    """(loss_B, better_B, lse_B, derivative_B, logit_B), differentiable in embeddings and weights."""
    norm_B = emb_BD.detach().norm(dim=1)
    if spec.normalise:
        cos_BR = (unit_rows(emb_BD) @ unit_rows(weight_RD).T).clamp(-1, 1)
    else:
        cos_BR = emb_BD @ weight_RD.T
    own_B = column_B >= 0
    column_B1 = column_B.clamp(min=0)[:, None]
    target_B = cos_BR.gather(1, column_B1).squeeze(1)
    known_B = target_values(own_B, target_B.detach(), world)
    value_B, derivative_B = spec.margin(known_B, norm_B)
    logit_B = spec.s * value_B
    # a term of value zero carries the derivative: the margin's value and derivative are what the specification gives
    value_B = value_B + torch.where(own_B, derivative_B * (target_B - target_B.detach()), torch.zeros_like(value_B))
    # how many classes are at least as good as the target, itself left out
    better_B = world.all_reduce_((cos_BR.detach() >= known_B[:, None]).sum(1) - own_B.to(torch.int64))

    if spec.filter_above:
        cos_BR = cos_BR.masked_fill(cos_BR.detach() > spec.filter_above, 0)
    in_place_B1 = torch.where(own_B[:, None], value_B[:, None], cos_BR.gather(1, column_B1))
    lse_B = torch.logsumexp(spec.s * cos_BR.scatter(1, column_B1, in_place_B1), dim=1)
    if world.size > 1:
        # the other ranks' share is a constant here: their rows are theirs
        lse_NB = world.all_gather(lse_B.detach()[None])
        # finite: some chips take inf for an overflow
        lse_NB[world.rank] = torch.finfo(lse_NB.dtype).min
        lse_B = torch.logaddexp(lse_B, torch.logsumexp(lse_NB, dim=0))
    return lse_B - spec.s * value_B, better_B, lse_B, derivative_B, logit_B


def second(kept, rows, spec, sink) -> None:
    """Σ_ij g_i dloss_i / dcos_ij * cos_ij, whose gradient with respect to the rows autograd knows."""
    weight_RD = rows.read(0, rows.count)[0].detach().to(kept.unit_BD.dtype).requires_grad_()
    with torch.enable_grad(), full_precision(weight_RD.device):
        cos_BR = kept.unit_BD @ (unit_rows(weight_RD) if spec.normalise else weight_RD).T
        if spec.normalise:
            cos_BR = cos_BR.clamp(-1, 1)
        with torch.no_grad():
            p_BR = (spec.s * cos_BR - kept.lse_B[:, None]).exp()
            if spec.filter_above:
                p_BR.masked_fill_(cos_BR > spec.filter_above, 0)
            members_BR = kept.members(0, rows.count)
            if members_BR is not None:
                p_BR.mul_(members_BR)
            own_B1, column_B1 = (kept.column_B >= 0)[:, None], kept.column_B.clamp(min=0)[:, None]
            p_BR.scatter_(1, column_B1, torch.where(own_B1, kept.minus_B[:, None], p_BR.gather(1, column_B1)))
            p_BR.mul_(spec.s * kept.grad_B[:, None])
        grad_RD = torch.autograd.grad((p_BR * cos_BR).sum(), weight_RD)[0]
    sink(0, rows.count, grad_RD)


OP = HeadOp("reference", first, second)
