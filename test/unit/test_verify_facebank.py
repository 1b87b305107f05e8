"""The face bank: people in folders, their embeddings in a file, and the nearest of them."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.errors import GalleryError
from verify import facebank

pytestmark = pytest.mark.core


def read_image(path):
    return np.asarray(Image.open(path).convert("RGB"))


def colour(images):
    """An embedding that a reader can check: the mean colour."""
    return images.mean(axis=(1, 2)) / 255


@pytest.fixture
def people(tmp_path):
    for name, greys in {"zoe": [0, 255], "ann": [51]}.items():
        (tmp_path / name).mkdir()
        for number, grey in enumerate(greys):
            Image.new("RGB", (112, 112), (grey, 0, 0)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "nobody").mkdir()
    (tmp_path / "zoe" / "notes.txt").write_text("not an image")
    return tmp_path


def test_a_person_is_the_mean_of_their_images(people):
    embeddings, names = facebank.build_facebank(people, colour, read_image)
    assert names == ["Unknown", "ann", "zoe"]
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, [[0.2, 0, 0], [0.5, 0, 0]], rtol=0, atol=1e-7)


def test_saved_and_loaded_unchanged(people):
    embeddings, names = facebank.build_facebank(people, colour, read_image)
    path = facebank.save_facebank(people, embeddings, names)
    assert path == people / "facebank.npz" and [p.name for p in people.glob("facebank*")] == ["facebank.npz"]
    again, names_again = facebank.load_facebank(people)
    assert np.array_equal(again, embeddings) and names_again == names


def test_nearest_is_the_smallest_squared_distance_or_nobody():
    rng = np.random.default_rng(0)
    source, target = rng.standard_normal((7, 32)), rng.standard_normal((5, 32))
    target[3] = source[2]
    distances = np.square(source[:, None] - target[None]).sum(-1)
    index, distance = facebank.nearest(source, target, threshold=1e9)
    assert index.tolist() == distances.argmin(1).tolist() and index[2] == 3 and distance[2] == 0
    np.testing.assert_allclose(distance, distances.min(1), rtol=1e-12)

    limit = float(np.median(distances.min(1)))  # itself one of them: only what lies above is nobody
    index, distance = facebank.nearest(torch.from_numpy(source), torch.from_numpy(target), limit)
    assert index.tolist() == [int(i) if d <= limit else -1 for i, d in zip(distances.argmin(1), distance)]
    assert (index == -1).sum() == 3


def test_no_face_gives_no_answer():
    index, distance = facebank.nearest(np.zeros((0, 4)), np.ones((2, 4)), 1.5)
    assert index.shape == distance.shape == (0,)


@pytest.mark.parametrize("target, words", [
    (np.zeros((0, 4)), "empty"), (np.zeros((3, 5)), "different models"), (np.zeros(4), "empty"),
])  # fmt: skip
def test_a_face_bank_that_does_not_fit(target, words):
    with pytest.raises(GalleryError, match=words):
        facebank.nearest(np.zeros((2, 4)), target, 1.5)


def test_folders_that_are_no_face_bank(people, tmp_path):
    with pytest.raises(GalleryError, match="missing holds no face bank"):
        facebank.build_facebank(tmp_path / "missing", colour, read_image)
    with pytest.raises(GalleryError, match="nobody holds no face bank"):
        facebank.build_facebank(people / "nobody", colour, read_image)
    Image.new("RGB", (100, 120)).save(people / "ann" / "9.png")
    with pytest.raises(GalleryError, match=r"9\.png is 100x120: align and crop"):
        facebank.build_facebank(people, colour, read_image)


def test_files_that_are_no_face_bank(tmp_path):
    def refused(words):
        with pytest.raises(GalleryError, match=words) as error:
            facebank.load_facebank(tmp_path)
        assert "\n" not in str(error.value)

    path = tmp_path / "facebank.npz"
    refused("does not exist")
    path.write_bytes(b"PK not a zip")
    refused("is not a face bank")
    np.savez(path, embeddings=np.zeros((2, 4)), names=np.array([object()] * 3))
    refused("is not a face bank")  # objects are pickles
    np.savez(path, embeddings=np.zeros((2, 4)), names=np.array(["Unknown", "ann"]))
    refused("2 names")
    np.savez(path, embeddings=np.zeros((2, 4)))
    refused("is not a face bank")
    np.savez_compressed(path, embeddings=np.zeros((2, 4)), names=np.array(["Unknown", "a", "b"]))
    refused("compressed")
    facebank.save_facebank(tmp_path, np.zeros((2, 4)), ["Unknown", "a", "b"])
    path.write_bytes(path.read_bytes()[:-40])
    refused("is not a face bank")
    assert not zipfile.is_zipfile(path)
