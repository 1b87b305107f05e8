"""The nearest of known faces, or nobody."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.errors import GalleryError
from verify.nearest import nearest

pytestmark = pytest.mark.core


def test_nearest_is_the_smallest_squared_distance_or_nobody():
    rng = np.random.default_rng(0)
    source, target = rng.standard_normal((7, 32)), rng.standard_normal((5, 32))
    target[3] = source[2]
    distances = np.square(source[:, None] - target[None]).sum(-1)
    index, distance = nearest(source, target, threshold=1e9)
    assert index.tolist() == distances.argmin(1).tolist() and index[2] == 3 and distance[2] == 0
    np.testing.assert_allclose(distance, distances.min(1), rtol=1e-12)

    limit = float(np.median(distances.min(1)))  # itself one of them: only what lies above is nobody
    index, distance = nearest(torch.from_numpy(source), torch.from_numpy(target), limit)
    assert index.tolist() == [int(i) if d <= limit else -1 for i, d in zip(distances.argmin(1), distance)]
    assert (index == -1).sum() == 3


def test_no_face_gives_no_answer():
    index, distance = nearest(np.zeros((0, 4)), np.ones((2, 4)), 1.5)
    assert index.shape == distance.shape == (0,)


@pytest.mark.parametrize("target, words", [
    (np.zeros((0, 4)), "empty"), (np.zeros((3, 5)), "different models"), (np.zeros(4), "empty"),
])  # fmt: skip
def test_a_gallery_that_does_not_fit(target, words):
    with pytest.raises(GalleryError, match=words):
        nearest(np.zeros((2, 4)), target, 1.5)


def test_a_face_of_nan_is_nobodys():
    faces = np.array([[np.nan, 0.0], [np.inf, 0.0], [1.0, 0.0]])
    index, _ = nearest(faces, np.eye(2), threshold=1.5)
    assert index.tolist() == [-1, -1, 0]
