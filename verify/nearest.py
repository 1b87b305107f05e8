"""Whose face is it: the nearest of known embeddings. (Galleries, with names and files, are deploy.gallery's.)

Shapes: B new faces, M known ones, D embedding size.
"""

from __future__ import annotations

import torch

from runtime.errors import GalleryError


def nearest(source_BD, target_MD, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The person nearest to each face: (index_B int64, distance_B), tensors on the source's device.

    The distance is the squared L2 distance of the embeddings; the index is -1 where it is above `threshold`.
    """
    source_BD = torch.as_tensor(source_BD)
    target_MD = torch.as_tensor(target_MD).to(source_BD)
    if target_MD.ndim != 2 or not len(target_MD):
        raise GalleryError("the gallery is empty")
    if source_BD.ndim != 2 or source_BD.shape[1] != target_MD.shape[1]:
        raise GalleryError(
            f"faces' embeddings {tuple(source_BD.shape)} and the gallery's {tuple(target_MD.shape)} do not fit: "
            "they come from different models"
        )
    # |s - t|^2 without |s|^2 finds the nearest in one product; its distance is then taken exactly
    score_BM = target_MD.square().sum(dim=1) - 2 * source_BD @ target_MD.T
    index_B = score_BM.topk(1, dim=1, largest=False).indices[:, 0]  # min() of torch 1.8 refuses B = 0
    distance_B = (source_BD - target_MD[index_B]).square().sum(dim=1)
    # not "distance > threshold": an embedding that is not finite has a distance of nan, and is nobody's
    return index_B.masked_fill(~(distance_B <= threshold), -1), distance_B
