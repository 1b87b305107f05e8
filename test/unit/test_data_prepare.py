"""tools.prepare_data: bytes kept, pixels kept, and a second run that continues the first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_set import jpeg, make_tiny_set
from workers_data import encode, picture, write_records

from data import open_dataset
from data.pairs import load_pairs
from data.recordio import RecordIOReader, pack, unpack
from runtime.errors import DataError
from tools import prepare_data
from tools.prepare_data import prepare

pytestmark = pytest.mark.core


def test_rec_to_imgs_keeps_the_bytes(tmp_path):
    make_tiny_set(tmp_path, classes=3, shots=4)
    (tmp_path / "lfw.bin").unlink()
    assert prepare(tmp_path) == ["imgs: 12 images written, 0 damaged"]
    reader = RecordIOReader(tmp_path / "train.rec", tmp_path / "train.idx")
    for key in range(1, 13):
        assert (tmp_path / "imgs" / str((key - 1) // 4) / f"{key}.jpg").read_bytes() == unpack(reader.read(key))[1]
    assert (tmp_path / "imgs_channel_order.txt").read_text() == "rgb\n"
    assert len(open_dataset(tmp_path / "imgs")) == 12


def test_a_second_run_continues(tmp_path):
    make_tiny_set(tmp_path, classes=2, shots=3)
    pytest.importorskip("bcolz")
    assert prepare(tmp_path, tmp_path / "out") == ["imgs: 6 images written, 0 damaged", "lfw: written"]
    (tmp_path / "out" / "imgs" / "1" / "5.jpg").write_bytes(b"cut off")
    (tmp_path / "out" / "imgs" / "0" / "1.jpg").unlink()
    (tmp_path / "out" / "lfw_list.npy").unlink()
    assert prepare(tmp_path, tmp_path / "out") == ["imgs: 2 images written, 0 damaged", "lfw: written"]
    assert prepare(tmp_path, tmp_path / "out") == ["imgs: 0 images written, 0 damaged", "lfw: already there"]
    assert not list((tmp_path / "out").rglob("*partial*"))


def test_bin_to_bcolz_keeps_the_pixels(tmp_path):
    pytest.importorskip("bcolz")
    make_tiny_set(tmp_path, pairs=5)
    prepare(tmp_path, tmp_path / "out")
    (expected, same), (images, issame) = load_pairs(tmp_path / "lfw.bin"), load_pairs(tmp_path / "out" / "lfw")
    np.testing.assert_array_equal(images[:], expected[:])
    np.testing.assert_array_equal(issame, same)
    import bcolz

    array = bcolz.carray(rootdir=str(tmp_path / "out" / "lfw"), mode="r")
    assert array.shape == (10, 3, 112, 112) and array.dtype == np.float32
    exact = (expected[3].transpose(2, 0, 1).astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
    np.testing.assert_array_equal(array[3], exact)


def test_suffix_follows_the_content_and_damage_is_skipped(tmp_path):
    png = encode(picture(1), "PNG")
    write_records(tmp_path, [pack(0, jpeg(0, 0)), pack(0, png), pack(1)])
    assert prepare(tmp_path) == ["imgs: 2 images written, 1 damaged"]
    assert (tmp_path / "imgs" / "0" / "1.png").read_bytes() == png


def test_bad_arguments(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        prepare(tmp_path / "nowhere")
    with pytest.raises(DataError, match="neither train.rec nor a verification .bin"):
        prepare(tmp_path)
    make_tiny_set(tmp_path)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="cannot be written"):
        prepare(tmp_path, tmp_path / "out")


def test_folders_beneath_data(tmp_path, monkeypatch):
    make_tiny_set(tmp_path / "data" / "faces_emore", classes=2, shots=1)
    (tmp_path / "data" / "faces_emore" / "lfw.bin").unlink()
    monkeypatch.chdir(tmp_path)
    assert prepare(prepare_data.Path("faces_emore")) == ["imgs: 2 images written, 0 damaged"]


def test_command_line(tmp_path, root):
    make_tiny_set(tmp_path, classes=2, shots=1)
    (tmp_path / "lfw.bin").unlink()
    command = [sys.executable, "-m", "tools.prepare_data", "--rec_path"]
    done = subprocess.run([*command, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and done.stdout == "imgs: 2 images written, 0 damaged\n"
    done = subprocess.run([*command, str(tmp_path / "no")], cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_what_it_did_not_make_stays(tmp_path):
    pytest.importorskip("bcolz")
    make_tiny_set(tmp_path, classes=2, shots=2, pairs=5)
    mine = {}
    for name in ("lfw/mine.txt", "lfw.partial/mine.txt", "imgs/0/mine.jpg", "imgs_channel_order.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("bgr\n")
        mine[path] = path.read_bytes()
    for name in ("imgs", "lfw"):
        with pytest.raises(DataError, match=f"{name}: is there and was not made by this command: move it away"):
            prepare(tmp_path)
        assert all(path.read_bytes() == content for path, content in mine.items())
        (tmp_path / name).rename(tmp_path / f"{name}_moved")
        mine = {Path(str(path).replace(f"/{name}/", f"/{name}_moved/")): text for path, text in mine.items()}
        mine.pop(tmp_path / "imgs_channel_order.txt", None)  # that of the folder which is moved away
    assert prepare(tmp_path) == ["imgs: 0 images written, 0 damaged", "lfw: written"]
    assert all(path.read_bytes() == content for path, content in mine.items())
    (tmp_path / "lfw" / ".made_by_prepare_data").unlink()
    (tmp_path / "lfw_list.npy").unlink()
    with pytest.raises(DataError, match="lfw: is there and was not made by this command"):
        prepare(tmp_path)
    assert (tmp_path / "lfw" / "meta" / "sizes").is_file()
