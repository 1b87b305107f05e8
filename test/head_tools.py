"""What tests of the head share."""

from __future__ import annotations

import torch

from head.ops import margin_loss
from runtime.dist import ALONE


def loss_and_gradients(op, emb_BD, rows, column_B, spec, grad_B=None, project=True):
    """(LossResult, d embeddings, d rows) of the sum of grad_B * loss_B, by both passes of an op.

    project=False: the rows' without taking off what lies along them, which Triton's update does by itself."""
    kept = []
    emb_BD = emb_BD.detach().clone().requires_grad_()
    result = margin_loss(op, emb_BD, rows, column_B, spec, ALONE, kept.append)
    result.loss_B.backward(torch.ones_like(result.loss_B) if grad_B is None else grad_B)
    return result, emb_BD.grad, rows_gradient(op, kept[0], rows, spec, project)


def rows_gradient(op, kept, rows, spec, project=True) -> torch.Tensor:
    """What the second pass hands to its sink, in one piece."""
    weight_RD = rows.read(0, rows.count)[0].to(kept.unit_BD.dtype)
    whole_RD = torch.full_like(weight_RD, float("nan"))

    def sink(start, stop, grad_KW, scale_K=None, along_K=None, weight_KW=None):
        part_KW = grad_KW if scale_K is None else grad_KW * scale_K[:, None]
        if along_K is not None and project:
            part_KW = part_KW - along_K[:, None] * weight_RD[start:stop]
        whole_RD[start:stop] = part_KW

    with torch.no_grad():
        op.second(kept, rows, spec, sink)
    return whole_RD
