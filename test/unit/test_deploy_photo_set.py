"""tools.align's folder of photos: what is made, what is told, and that running again does only what is left."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
from PIL import Image
from tiny_deploy import RedFaces

from deploy import photo_set
from deploy.photo_set import RECORD, REPORT, Settings, align_folder, unaligned
from runtime.errors import DataError


@pytest.fixture
def detector():
    return RedFaces()


@pytest.fixture
def photos(tmp_path, monkeypatch, detector):
    monkeypatch.setattr(photo_set, "open_detector", lambda *_: detector)
    folder = tmp_path / "photos"
    (folder / "ann").mkdir(parents=True)
    image = np.full((150, 300, 3), 90, np.uint8)
    image[5, 7] = image[9, 160] = (255, 0, 0)
    Image.fromarray(image).save(folder / "ann" / "two faces.png")
    Image.fromarray(image[:, :140]).save(folder / "ann" / "one<b>.png")
    Image.new("RGB", (60, 60)).save(folder / "nobody.jpg")
    (folder / "text.jpg").write_text("no image")
    return folder


def made(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))


def test_photos_are_told_from_a_set(photos, tmp_path):
    assert not unaligned(photos)  # one person is nobody to tell from others
    (photos / "bob").mkdir()
    (photos / "bob" / "1.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert unaligned(photos) and not unaligned(photos / "ann")
    (photos / "label.txt").write_text("ann/two faces.png\tann\n")  # a gallery's list
    assert unaligned(photos)
    (photos / "train.rec").write_bytes(b"")
    assert not unaligned(photos)
    for person in "ab":
        (tmp_path / "set" / person).mkdir(parents=True)
        Image.new("RGB", (112, 112)).save(tmp_path / "set" / person / "1.png")
    assert not unaligned(tmp_path / "set")


def test_faces_keep_their_folders_and_every_photo_is_told(photos, tmp_path):
    target = tmp_path / "aligned"
    ends = align_folder(photos, target, workers=1, say=str)
    assert made(target) == ["ann/one<b>.png.jpg", "ann/two faces.png.jpg"]
    assert ends["aligned"] == 2 and ends["no face was found"] == 1 and sum(ends.values()) == 4
    with Image.open(target / "ann" / "two faces.png.jpg") as face:
        assert face.size == (112, 112)
    page = (target / REPORT).read_text()
    assert "4 photos, 2 with a face" in page and "no face was found" in page and "not an image" in page
    assert "<b>" not in page.replace("<body", "") and "http" not in page
    align_folder(photos, tmp_path / "all", Settings(faces="all"), workers=1, say=str)
    assert made(tmp_path / "all") == [f"ann/{name}.png_{n}.jpg" for name, n in
                                      (("one<b>", 1), ("two faces", 1), ("two faces", 2))]  # fmt: skip


def test_again_only_what_is_new_changed_or_lost(photos, tmp_path, detector):
    target = tmp_path / "aligned"
    align_folder(photos, target, workers=1, say=str)
    before = detector.seen
    align_folder(photos, target, workers=1, say=str)
    assert detector.seen == before
    with open(target / RECORD, "a") as record:  # killed in the middle of a line
        record.write('{"photo": "ann/tw')
    (target / "ann" / "one<b>.png.jpg").unlink()
    os.utime(photos / "nobody.jpg", (time.time(), time.time() + 5))
    align_folder(photos, target, workers=1, say=str)
    assert detector.seen == before + 2 and len(made(target)) == 2
    align_folder(photos, target, Settings(min_face=200), workers=1, say=str)  # other settings: every photo
    assert detector.seen == before + 5
    last = [json.loads(line) for line in (target / RECORD).read_text().splitlines() if line.endswith("}")][-1]
    assert set(last) == {"photo", "stamp", "settings", "faces", "why"}


def test_a_users_file_is_not_replaced(photos, tmp_path):
    target = tmp_path / "aligned"
    (target / "ann").mkdir(parents=True)
    (target / "ann" / "one<b>.png.jpg").write_text("mine")
    ends = align_folder(photos, target, workers=1, say=str)
    assert (target / "ann" / "one<b>.png.jpg").read_text() == "mine" and ends["aligned"] == 1
    assert any("is not this command's" in end for end in ends)


@pytest.mark.parametrize("target, words", [(".", "lies in the folder"), ("ann/faces", "lies in the folder"),
                                           ("nobody.jpg", "is no folder")])  # fmt: skip
def test_folders_that_cannot_be(photos, target, words):
    with pytest.raises(DataError, match=words):
        align_folder(photos, photos / target, workers=1)
    with pytest.raises(DataError, match="no such folder"):
        align_folder(photos / "missing", photos / target, workers=1)


def test_processes_make_what_one_makes(tmp_path, shared):
    """Real photos, the real detector, two processes."""
    pytest.importorskip("onnxruntime")
    settings = Settings(det_model=str(shared / "models" / "yunet_n_dynamic.onnx"))
    gallery = shared / "real" / "friends" / "gallery"
    for workers in (1, 2):
        ends = align_folder(gallery, tmp_path / str(workers), settings, workers, say=str)
        assert ends == {"aligned": 36}
    one, two = tmp_path / "1", tmp_path / "2"
    assert made(one) == made(two) and all((one / name).read_bytes() == (two / name).read_bytes() for name in made(one))
