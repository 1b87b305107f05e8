"""Five landmarks to a 112x112 face: the similarity transform on the ArcFace template, for many faces at once.

Shapes: N faces, 5 landmarks (left eye, right eye, nose, left and right corner of the mouth as the picture shows them)
of (x, y) in pixels, S the side of the output.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIZE = 112
# Where the five landmarks lie in an aligned face of 112x112, the template that ArcFace's training sets were made with.
TEMPLATE_52 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
FACES_AT_ONCE = 64  # bounds the memory of a picture with a thousand faces


def similarity_transforms(points_N52: np.ndarray, template_52: np.ndarray = TEMPLATE_52) -> np.ndarray:
    """The rotation, scale and shift (no reflection) that bring each face nearest to the template: float64 [N, 2, 3].

    `matrix @ (x, y, 1)` is the place in the aligned face. Least squares over the five points (Umeyama 1991); in two
    dimensions the solution is closed: scale and rotation are one complex number. Faces whose landmarks all coincide
    come out as nan.
    """
    points_N5 = np.asarray(points_N52, np.float64) @ (1, 1j)
    template_5 = template_52 @ (1, 1j)
    mean_N1 = points_N5.mean(axis=1, keepdims=True)
    centered_N5 = points_N5 - mean_N1
    with np.errstate(all="ignore"):
        factor_N = (centered_N5.conj() * (template_5 - template_5.mean())).sum(axis=1) / np.square(
            np.abs(centered_N5)
        ).sum(axis=1)
        shift_N = template_5.mean() - factor_N * mean_N1[:, 0]
    a, b = factor_N.real, factor_N.imag
    return np.stack([np.stack([a, -b, shift_N.real], -1), np.stack([b, a, shift_N.imag], -1)], axis=1)


def align_faces(image_HWC: np.ndarray, points_N52: np.ndarray, size: int = SIZE) -> np.ndarray:
    """The faces of one picture, uint8 [N, S, S, 3]: bilinear, black outside of the picture.

    Where a face is more than twice as large as the output, the picture is first reduced by a whole factor, so that no
    pixel goes unseen.
    """
    transforms_N23 = similarity_transforms(points_N52)
    transforms_N23 = transforms_N23 * (size / SIZE)
    pixels_N = 1 / np.hypot(transforms_N23[:, 0, 0], transforms_N23[:, 1, 0])  # the picture's for one of the output
    factor_N = np.nan_to_num(pixels_N, nan=1, posinf=1).clip(1, max(image_HWC.shape[:2])).astype(int)
    faces_NSS3 = np.zeros((len(transforms_N23), size, size, 3), np.uint8)
    for factor in np.unique(factor_N):
        reduced_HWC = image_HWC if factor == 1 else np.asarray(Image.fromarray(image_HWC).reduce(int(factor)))
        rows = np.flatnonzero(factor_N == factor)
        for start in range(0, len(rows), FACES_AT_ONCE):
            chunk = rows[start : start + FACES_AT_ONCE]
            faces_NSS3[chunk] = _warp(reduced_HWC, transforms_N23[chunk], size, factor)
    return faces_NSS3


def _warp(image_HWC: np.ndarray, transforms_N23: np.ndarray, size: int, factor: int) -> np.ndarray:
    """transforms: from the unreduced picture's pixels to the output's."""
    height, width = image_HWC.shape[:2]
    whole = np.isfinite(transforms_N23).all(axis=(1, 2))
    transforms_N23 = np.where(whole[:, None, None], transforms_N23, [[1.0, 0, 1e9], [0, 1, 1e9]])
    inverse_N22 = np.linalg.inv(transforms_N23[:, :, :2])
    grid_2P = np.stack(np.meshgrid(np.arange(size), np.arange(size)), 0).reshape(2, -1)
    source_N2P = inverse_N22 @ (grid_2P - transforms_N23[:, :, 2:])
    # the middle of reduced pixel i lies at factor * i + (factor - 1) / 2
    source_N2P = (source_N2P - (factor - 1) / 2) / factor
    x_NP = source_N2P[:, 0].clip(-2, width + 1)
    y_NP = source_N2P[:, 1].clip(-2, height + 1)
    left_NP, top_NP = np.floor(x_NP).astype(np.int32), np.floor(y_NP).astype(np.int32)
    wx_NP, wy_NP = (x_NP - left_NP).astype(np.float32), (y_NP - top_NP).astype(np.float32)
    out_NP3 = np.zeros((*x_NP.shape, 3), np.float32)
    for dy, weight_y in ((0, 1 - wy_NP), (1, wy_NP)):
        for dx, weight_x in ((0, 1 - wx_NP), (1, wx_NP)):
            row_NP, column_NP = top_NP + dy, left_NP + dx
            inside_NP = (row_NP >= 0) & (row_NP < height) & (column_NP >= 0) & (column_NP < width)
            pixel_NP3 = image_HWC[row_NP.clip(0, height - 1), column_NP.clip(0, width - 1)]
            out_NP3 += pixel_NP3 * (weight_x * weight_y * inside_NP)[..., None]
    return np.rint(out_NP3).astype(np.uint8).reshape(-1, size, size, 3)
