"""The gallery: who is stored, who is nearest, what other projects' galleries hold, and what a kill leaves."""

from __future__ import annotations

import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

from deploy import gallery as galleries
from deploy.gallery import UNKNOWN, Gallery, Match, open_gallery, read_facebank, read_index_bin, read_npz
from runtime.errors import GalleryError


def people(count, dimension=32, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(params=["faiss", "numpy"])
def engine(request, monkeypatch):
    monkeypatch.setattr(galleries.SearchIndex, "BLOCK", 3)  # of a large gallery there are many
    if request.param == "faiss":
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    return request.param


@pytest.mark.parametrize("storage", galleries.STORAGE)
def test_the_nearest_are_those_of_a_product_in_float64(engine, storage):
    stored, asked = people(700), people(9, seed=1)
    with Gallery.create(":memory:", "model", 32, storage=storage) as gallery:
        gallery.add_many((f"p{i}", vector * 5) for i, vector in enumerate(stored))  # any length goes in
        found = gallery.search(asked, 4)
    similarity = asked.astype(np.float64) @ stored.T.astype(np.float64)
    order = np.argsort(-similarity, axis=1)[:, :4]
    assert [[match.name for match in row] for row in found] == [[f"p{i}" for i in row] for row in order]
    got = [[match.similarity for match in row] for row in found]
    np.testing.assert_allclose(got, np.take_along_axis(similarity, order, 1), rtol=0, atol=1e-6)


def test_adding_and_removing_without_building_anew(engine, tmp_path):
    path, vectors = tmp_path / "g.db", people(5)
    with Gallery.create(path, "model", 32, threshold=1.2) as gallery, Gallery.open(path, "model") as other:
        assert gallery.search(vectors) == [[]] * 5  # an empty gallery knows nobody
        assert gallery.add("ann", vectors[:2]) == 2 and gallery.add("bob", vectors[2]) == 1
        assert gallery.people() == {"ann": 2, "bob": 1} and len(other) == 3
        assert other.identify(vectors[[1, 2, 4]])[:2] == [
            Match("ann", pytest.approx(1)),
            Match("bob", pytest.approx(1)),
        ]
        assert other.identify(vectors[[4]])[0].name == UNKNOWN
        assert other.remove("ann") == 2 and other.remove("ann") == 0 and len(gallery) == 1
        assert gallery.search(vectors[:1], 9)[0][0].name == "bob"  # asked for more than there are
        other.add("eve", vectors[3])
        assert gallery.identify(vectors[[3]])[0].name == "eve"
    with Gallery.open(path) as gallery:
        assert gallery.people() == {"bob": 1, "eve": 1} and gallery.threshold == 1.2


def test_a_threshold_is_a_squared_distance():
    a, b = np.eye(2, dtype=np.float32)
    with Gallery.create(":memory:", "model", 2) as gallery:
        gallery.add("a", a)
        half = (a + b) / np.sqrt(2)  # squared distance 2 - sqrt(2) = 0.586
        assert [gallery.identify(half, threshold)[0].name for threshold in (0.58, 0.59, None)] == [UNKNOWN, "a", "a"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_what_is_no_direction_is_never_stored_and_never_matched(engine, bad):
    vectors = people(2)
    broken = vectors[0].copy()
    broken[3] = bad
    broken = broken * 0 if bad == 0 else broken
    with Gallery.create(":memory:", "model", 32) as gallery:
        with pytest.raises(GalleryError, match="not finite or zero"):
            gallery.add("ann", [vectors[0], broken])
        assert len(gallery) == 0
        gallery.add("ann", vectors[0])
        assert gallery.search(np.stack([broken, vectors[0]]))[0] == []
        assert gallery.identify(broken)[0].name == UNKNOWN


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "esc\x1b[31m", "x" * 201, None, 7])
def test_names_that_are_no_line(name):
    with Gallery.create(":memory:", "model", 32) as gallery:
        with pytest.raises(GalleryError, match="name"):
            gallery.add(name, people(1))
        assert len(gallery) == 0
        gallery.add(" 王/小明 ", people(1))  # a slash is only a character: a name is never a path
        assert gallery.people() == {"王/小明": 1}


def test_another_model_is_refused(tmp_path):
    Gallery.create(tmp_path / "g.db", "one", 32).close()
    with pytest.raises(GalleryError, match="another model .*--build_index"):
        Gallery.open(tmp_path / "g.db", "two")
    with Gallery.open(tmp_path / "g.db", "one") as gallery, pytest.raises(GalleryError, match="32: another model"):
        gallery.add("ann", people(1, 16))
    with Gallery.open(tmp_path / "g.db") as gallery, pytest.raises(GalleryError, match="32: another model"):
        gallery.search(people(1, 16))


def test_nothing_that_is_there_is_replaced(tmp_path):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(GalleryError, match="is there already"):
        Gallery.create(tmp_path / "mine", "model", 32)
    with pytest.raises(GalleryError, match="is no gallery"):
        Gallery.open(tmp_path / "mine")
    with pytest.raises(GalleryError, match="no such gallery"):
        Gallery.open(tmp_path / "missing")
    assert (tmp_path / "mine").read_text() == "text" and [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_foreign_or_damaged_database_is_refused(tmp_path):
    path = tmp_path / "g.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE other (x)")
    db.close()
    with pytest.raises(GalleryError, match="no gallery of this project"):
        Gallery.open(path)
    path.unlink()
    with Gallery.create(path, "model", 32) as gallery:
        gallery.add("ann", people(1))
        gallery.add("bob", people(1, seed=1))
    data = bytearray(path.read_bytes())
    place = data.index(people(1).tobytes()[:32])
    for bit in range(8):  # one bit of one vector
        data[place + 5] ^= 1 << bit
        path.write_bytes(data)
        with pytest.raises(GalleryError, match="'ann' .*damaged"):
            Gallery.open(path)
        data[place + 5] ^= 1 << bit
    path.write_bytes(data[:5000])
    with pytest.raises(GalleryError):
        Gallery.open(path)
    path.write_bytes(data)
    with sqlite3.connect(path) as db:
        db.execute("CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM entries; END")
    db.close()
    with pytest.raises(GalleryError, match="no gallery of this project"):
        Gallery.open(path)


ADD_FOR_EVER = """
import sys, numpy as np
from deploy.gallery import Gallery
gallery, number = Gallery.open(sys.argv[1]), 0
while True:
    gallery.add_many([(f"p{number}", np.random.rand(32) + 0.1) for _ in range(7)])
    number += 1
    if number % 3 == 0:
        gallery.remove(f"p{number - 2}")
    print(number, flush=True)
"""


def test_kill_9_at_any_moment_leaves_whole_people(tmp_path, root):
    path = tmp_path / "g.db"
    Gallery.create(path, "model", 32).close()
    for round_ in range(4):
        process = subprocess.Popen([sys.executable, "-c", ADD_FOR_EVER, str(path)], cwd=root, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.05 + 0.07 * round_)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        with Gallery.open(path) as gallery:
            counts = gallery.people()
            assert counts and all(count % 7 == 0 for count in counts.values())
            assert len(gallery) == sum(counts.values())


# --- other projects ---------------------------------------------------------------------------------------------------


def write_index_bin(path, labels, features):
    path.write_bytes(pickle.dumps({"label": labels, "feature": features}, protocol=3))
    return path


def test_index_bin_of_insight_face_paddle(shared, caplog):
    path = shared / "real" / "friends" / "index.bin"
    with open_gallery(path, "model", 128) as gallery:
        assert gallery.people() == {
            "Chandler": 41, "Joey": 44, "Monica": 41, "Phoebe": 40, "Rachel": 39, "Ross": 40
        }  # fmt: skip
        stored = read_index_bin(path)
        assert len(stored) == 245 and abs(np.linalg.norm(stored[0][1]) - 5) < 3
        assert gallery.identify(stored[50][1])[0] == Match(stored[50][0], pytest.approx(1, abs=1e-5))
    assert "names no model" in caplog.text
    with pytest.raises(GalleryError, match="holds vectors of 128 numbers, the model's have 512"):
        open_gallery(path, "model", 512)


class Attack:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("value", [
    Attack(), {"label": ["a"]}, {"label": ["a"], "feature": []}, {"label": [], "feature": []}, [1],
    {"label": ["a", "b"], "feature": [np.zeros((1, 4), np.float32), np.zeros((1, 5), np.float32)]},
    {"label": ["a"], "feature": [np.zeros((1, 4))]}, {"label": ["a\nb"], "feature": [np.ones((1, 4), np.float32)]},
])  # fmt: skip
def test_an_index_that_is_none(tmp_path, value, capsys):
    path = tmp_path / "index.bin"
    path.write_bytes(pickle.dumps(value, protocol=3))
    with pytest.raises(GalleryError) as error:
        open_gallery(path, "model", 4)
    assert "\n" not in str(error.value) and "code ran" not in capsys.readouterr().out


def test_facebank_of_insightface_pytorch(tmp_path):
    vectors = people(2, 16)
    torch.save(torch.from_numpy(vectors), tmp_path / "facebank.pth")
    np.save(tmp_path / "names.npy", np.array(["Unknown", "ann", "bob"]))
    assert [name for name, _ in read_facebank(tmp_path)] == ["ann", "bob"]
    with open_gallery(tmp_path, "model", 16) as gallery:
        assert gallery.identify(vectors[1])[0].name == "bob"
    np.save(tmp_path / "names.npy", np.array([object()] * 3), allow_pickle=True)
    with pytest.raises(GalleryError, match="cannot be read"):
        read_facebank(tmp_path)
    (tmp_path / "names.npy").unlink()
    with pytest.raises(GalleryError, match="is missing"):
        read_facebank(tmp_path)


def test_the_npz_of_older_versions(tmp_path):
    path = tmp_path / "facebank.npz"
    np.savez(path, embeddings=people(2), names=np.array(["Unknown", "ann", "bob"]))
    assert [name for name, _ in read_npz(path)] == ["ann", "bob"]
    np.savez_compressed(path, embeddings=people(2), names=np.array(["Unknown", "ann", "bob"]))
    with pytest.raises(GalleryError, match="compressed"):
        read_npz(path)
    path.write_bytes(b"PK no zip")
    assert not zipfile.is_zipfile(path)
    with pytest.raises(GalleryError, match="is no facebank"):
        read_npz(path)
