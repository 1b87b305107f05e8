"""The other training sets: folders, label.txt, base64 lists, kv .bin; and how open_dataset tells them apart."""

from __future__ import annotations

import base64
import os
import pickle
import struct

import numpy as np
import pytest
from tiny_set import jpeg, make_tiny_set
from workers_data import digest, encode, picture

import config
from data import DATA_MODES, base64_reader, kv_bin, open_dataset
from data.base64_reader import Base64Dataset
from data.files import PackedStrings
from data.folder import open_folder
from data.image_list import open_image_list, read_list, write_list
from data.images import decode_image
from runtime.errors import DamagedItem, DataError

pytestmark = pytest.mark.core


def _fails(match: str, path, **options) -> None:
    with pytest.raises(DataError, match=match) as caught:
        open_dataset(path, **options)
    assert "\n" not in str(caught.value)


def _put(path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _image_folder(root, classes=("10", "2", "a b")):
    for number, name in enumerate(classes):
        for shot in range(3):
            _put(root / name / f"{shot}.jpg", jpeg(number, shot))
    return root


def test_packed_strings():
    strings = ["", "a", "é/ü b.jpg", "x" * 300, "bad\udc80name"]
    packed = pickle.loads(pickle.dumps(PackedStrings(strings)))
    assert [packed[index] for index in range(len(packed))] == strings


# Folders


def test_folder_order_is_image_folders(tmp_path):
    root = _image_folder(tmp_path / "imgs")
    _put(root / "2" / "deeper" / "9.PNG", encode(picture(1), "PNG"))
    _put(root / "2" / "notes.txt", b"no image")
    dataset = open_dataset(tmp_path)
    assert dataset.num_classes == 3
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert [dataset.describe(index)[len(str(root)) + 1 :] for index in (0, 5, 6, 7)] == [
        "10/0.jpg",
        "2/2.jpg",
        "2/deeper/9.PNG",
        "a b/0.jpg",
    ]
    np.testing.assert_array_equal(dataset[4][0], decode_image(jpeg(1, 1)))
    assert dataset[4][1] == 1


def test_class_names_are_sorted_as_strings(tmp_path):
    root = _image_folder(tmp_path / "imgs", ("10", "9", "B", "a", "_"))
    _put(root / "B" / "0" / "z.jpg", jpeg(0, 7))  # a deeper folder comes after the class's own images
    dataset = open_folder(root)
    names = [dataset.describe(index)[len(str(root)) + 1 :] for index in range(len(dataset))]
    assert names == [
        f"{name}/{shot}"
        for name in ("10", "9", "B", "_", "a")
        for shot in ["0.jpg", "1.jpg", "2.jpg"] + (["0/z.jpg"] if name == "B" else [])
    ]


def test_class_folders_without_imgs(tmp_path):
    assert open_dataset(_image_folder(tmp_path)).num_classes == 3


def test_bad_folders(tmp_path):
    (tmp_path / "imgs").mkdir()
    _fails("holds no class folder", tmp_path)
    _image_folder(tmp_path / "imgs")
    (tmp_path / "imgs" / "empty").mkdir()
    _fails("empty: this class folder holds no image", tmp_path)


def test_a_file_that_vanished_is_damage(tmp_path):
    dataset = open_dataset(_image_folder(tmp_path))
    (tmp_path / "2" / "1.jpg").unlink()
    with pytest.raises(DamagedItem, match="1.jpg: cannot be read"):
        dataset[4]


def test_bgr_folder(tmp_path):
    images = _image_folder(tmp_path / "imgs")
    plain, swapped = open_dataset(tmp_path), open_dataset(tmp_path, channel_order="bgr")
    np.testing.assert_array_equal(plain[3][0], swapped[3][0][:, :, ::-1])
    images.with_name("imgs_channel_order.txt").write_text("bgr\n")
    assert digest(open_dataset(tmp_path)) == digest(swapped)
    assert digest(open_dataset(tmp_path, channel_order="rgb")) == digest(plain)
    _fails("choose from rgb, bgr", tmp_path, channel_order="gbr")


# label.txt


@pytest.mark.parametrize("separator", [" ", "\t", "  \t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_image_list(tmp_path, separator, end):
    names = ["images/0.jpg", "images/with space/1 2.jpg", "./images/3.jpg"]
    for number, name in enumerate(names):
        _put(tmp_path / name, jpeg(number, 0))
    lines = ['# delimiter: "\\t"', *(f"{name}{separator}{label}" for name, label in zip(names, (2, 0, 0))), ""]
    (tmp_path / "label.txt").write_bytes(end.join(lines).encode())
    dataset = open_dataset(tmp_path)
    assert dataset.labels.tolist() == [2, 0, 0] and dataset.num_classes == 3
    np.testing.assert_array_equal(dataset[1][0], decode_image(jpeg(1, 0)))
    assert digest(open_dataset(tmp_path / "label.txt")) == digest(dataset)


def test_list_lines(tmp_path):
    path = tmp_path / "label.txt"
    path.write_text("\ufeffa.jpg 1\n# 7.jpg 3\n\na b\t4\n", encoding="utf-8")
    assert list(read_list(path)) == [("a.jpg", 1), ("a b", 4)]  # neither comment nor byte-order mark is a class


def test_written_list(tmp_path):
    items = [("a b/c.jpg", 3), ("d\udc80.jpg", 0)]
    write_list(tmp_path / "label.txt", iter(items))
    assert list(read_list(tmp_path / "label.txt")) == items
    assert [path.name for path in tmp_path.iterdir()] == ["label.txt"]


@pytest.mark.parametrize(
    "line, match",
    [
        ("b.jpg", "label.txt line 2: 'b.jpg' is not 'path label'"),
        ("b.jpg x", "line 2"),
        ("b.jpg -1", "line 2"),
        ("b.jpg 1.5", "line 2"),
        ("b.jpg " + "9" * 5000, "line 2"),
        ("b.jpg 9223372036854775808", "line 2"),
        ("b.jpg \u0663", "line 2"),  # a digit, elsewhere
        ("../b.jpg 0", "line 2: path '../b.jpg' leaves"),
        ("/b.jpg 0", "line 2: path"),
    ],
)
def test_bad_list_line(tmp_path, line, match):
    _put(tmp_path / "a.jpg", jpeg(0, 0))
    (tmp_path / "label.txt").write_text(f"a.jpg 0\n{line}\n")
    _fails(match, tmp_path)


def test_bad_lists(tmp_path):
    (tmp_path / "label.txt").write_text("\n")
    _fails("lists no image", tmp_path)
    _put(tmp_path / "a.jpg", jpeg(0, 0))
    (tmp_path / "label.txt").write_text("a.jpg 5\n")
    _fails("holds label 5, beyond num_classes=5", tmp_path, num_classes=5)
    assert open_dataset(tmp_path, num_classes=6).num_classes == 6
    with pytest.raises(DataError, match="cannot be read"):
        open_image_list(tmp_path / "absent.txt")


def test_list_of_kv_bins(tmp_path):
    _put(tmp_path / "images" / "a.bin", kv_bin.build("a.jpg", jpeg(0, 0)))
    _put(tmp_path / "images" / "b.bin", kv_bin.build("b.jpg", jpeg(1, 0))[:-3])
    (tmp_path / "label.txt").write_text("images/a.bin\t0\nimages/b.bin\t1")
    dataset = open_dataset(tmp_path)
    np.testing.assert_array_equal(dataset[0][0], decode_image(jpeg(0, 0)))
    with pytest.raises(DamagedItem, match="b.bin: claims a value of"):
        dataset[1]


# kv .bin


def test_kv_layout_and_round_trip(tmp_path):
    image = jpeg(3, 3)
    _put(tmp_path / "face é.jpg", image)
    kv_bin.image_to_bin(tmp_path / "face é.jpg", tmp_path / "x.bin")
    data, name = (tmp_path / "x.bin").read_bytes(), "face é.jpg".encode()
    value = pickle.dumps(image, -1)
    assert data == struct.pack("<I", len(name)) + name + struct.pack("<I", len(value)) + value
    kv_bin.bin_to_image(tmp_path / "x.bin", tmp_path / "y.jpg")
    assert (tmp_path / "y.jpg").read_bytes() == image
    assert kv_bin.parse(data) == ("face é.jpg", image)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_kv_of_any_pickle_protocol(protocol):
    value = pickle.dumps(b"\xff\xd8\x00image", protocol)
    assert kv_bin.parse(struct.pack("<I", 1) + b"k" + struct.pack("<I", len(value)) + value)[1] == b"\xff\xd8\x00image"


def _kv(value: bytes) -> bytes:
    return struct.pack("<I", 1) + b"k" + struct.pack("<I", len(value)) + value


@pytest.mark.parametrize(
    "data, match",
    [
        (b"", "cut off before the length of its key"),
        (struct.pack("<I", 2**32 - 1), "claims a key of 4294967295"),
        (struct.pack("<I", 1) + b"k", "before the length of its value"),
        (_kv(b"ab") + b"x", "1 bytes follow"),
        (_kv(b"cos\nsystem\n(U\x04truetR."), "refused: the pickle holds os.system"),
        (_kv(b"junk"), "not a whole pickle"),
        (_kv(pickle.dumps("text")), "its value is str"),
        (_kv(pickle.dumps([b"x"])), "its value is list"),
    ],
)
def test_bad_kv(tmp_path, data, match):
    with pytest.raises(DamagedItem, match=match):
        kv_bin.parse(data)
    _put(tmp_path / "x.bin", data)
    with pytest.raises(DataError, match=f"x.bin: .*{match}"):
        kv_bin.bin_to_image(tmp_path / "x.bin", tmp_path / "y.jpg")
    assert not (tmp_path / "y.jpg").exists()
    with pytest.raises(DataError, match="absent.jpg: cannot be read"):
        kv_bin.image_to_bin(tmp_path / "absent.jpg", tmp_path / "y.bin")


# base64 lists


def _base64_set(root, label_first: bool = False, end: str = "\n"):
    lines = []
    for number in range(6):
        fields = [base64.b64encode(jpeg(number % 3, number)).decode(), str(number % 3)]
        lines.append("\t".join(fields[::-1] if label_first else fields) + end)
    _put(root / "parts" / "one", "".join(lines[:4]).encode())
    _put(root / "part two", ("".join(lines[4:]) + end).encode())
    (root / "file_list.txt").write_text("parts/one\n\npart two\n")
    return root


@pytest.mark.parametrize("label_first", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_base64_either_order(tmp_path, label_first, end):
    dataset = open_dataset(_base64_set(tmp_path, label_first, end))
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2] and dataset.num_classes == 3
    for number in range(6):
        np.testing.assert_array_equal(dataset[number][0], decode_image(jpeg(number % 3, number)))
    assert digest(pickle.loads(pickle.dumps(dataset))) == digest(open_dataset(tmp_path / "file_list.txt"))


def test_written_base64(tmp_path):
    _base64_set(tmp_path / "by hand")
    items = [(jpeg(number % 3, number), number % 3) for number in range(6)]
    base64_reader.write_part(tmp_path / "one", iter(items[:4]))
    base64_reader.write_part(tmp_path / "two", iter(items[4:]))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "by hand" / "parts" / "one").read_bytes()
    (tmp_path / "file_list.txt").write_text("one\ntwo\n")
    assert digest(open_dataset(tmp_path)) == digest(open_dataset(tmp_path / "by hand"))


def _replace_line(root, number: int, line: bytes) -> None:
    lines = (root / "parts" / "one").read_bytes().splitlines(keepends=True)
    lines[number] = line
    (root / "parts" / "one").write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    "line",
    [
        b"7\t/9j/4AAQ\n",
        b"/9j/4AAQ\n",
        b"/9j/4AAQ\tx\n",
        b"/9j/4AAQ\t-1\n",
        b"1\t2\n",
        b"/9j/\t1\t2\n",
        b"\t3\n",
        b"/9j/4AAQ 3\n",
    ],
)
def test_every_base64_line_is_checked(tmp_path, line):
    _replace_line(_base64_set(tmp_path), 2, line)
    _fails("one line 3: is not 'base64<TAB>label'", tmp_path)


@pytest.mark.parametrize("line", [b"/9j/4AAQ\t2\n", b"2\t/9j/\t4AAQ\n", b"x\t/9j/4AAQ\n", b"2\t\n"])
def test_every_base64_line_with_its_label_first_is_checked(tmp_path, line):
    _replace_line(_base64_set(tmp_path, label_first=True), 2, line)
    _fails("one line 3: is not 'label<TAB>base64'", tmp_path)


def test_bad_base64_lists(tmp_path, monkeypatch):
    root = _base64_set(tmp_path)
    _replace_line(root, 0, b"5\t5\n")
    _fails("line 1: is neither", tmp_path)
    (root / "file_list.txt").write_text("../secret\n")
    _fails("file_list.txt line 1: path '../secret' leaves", tmp_path)
    (root / "file_list.txt").write_text("absent\n")
    _fails("line 1: there is no part file", tmp_path)
    (root / "file_list.txt").write_text("\n")
    _fails("names no part file", tmp_path)
    _base64_set(tmp_path)
    monkeypatch.setattr(base64_reader, "_MAX_LINE", 1000)
    _fails("line 1: (is neither|longer than)", tmp_path)


def test_bad_base64_is_damage(tmp_path):
    root = _base64_set(tmp_path)
    _replace_line(root, 2, b"/9j/*4AAQ\t2\n")
    dataset = open_dataset(tmp_path)
    with pytest.raises(DamagedItem, match="one byte [0-9]+: not base64"):
        dataset[2]
    assert dataset[3][1] == 0


def test_base64_places_not_lines_stay_in_memory(tmp_path):
    text = pickle.dumps(Base64Dataset(_base64_set(tmp_path) / "file_list.txt"))
    assert len(text) < (tmp_path / "parts" / "one").stat().st_size / 4


# What stands where


def test_data_modes(tmp_path):
    for number, name in enumerate(("faces_emore", "faces_ms1m_112x112", "faces_vgg_112x112", "own")):
        make_tiny_set(tmp_path / name, classes=2 + number, shots=2)
    assert set(DATA_MODES) == {"vgg", "ms1m", "emore", "concat"}
    for mode, classes in (("emore", 2), ("ms1m", 3), ("vgg", 4), ("own", 5), ("concat", 7)):
        assert open_dataset(tmp_path, mode).num_classes == classes
    # the launchers are given the set's own folder, whatever it is called
    assert open_dataset(tmp_path / "own", "emore").num_classes == 5
    assert open_dataset(tmp_path / "own", "own").num_classes == 5
    _fails("data_mode 'emroe': .* choose from vgg, ms1m, emore, concat, synthetic", tmp_path, data_mode="emroe")
    _fails("data_mode 'concat'", tmp_path / "own", data_mode="concat")


def test_concat(tmp_path):
    make_tiny_set(tmp_path / "faces_ms1m_112x112", classes=2, shots=2)
    make_tiny_set(tmp_path / "faces_vgg_112x112", classes=3, shots=1)
    dataset = open_dataset(tmp_path, "concat")
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2, 3, 4]
    assert [dataset[index][1] for index in range(7)] == dataset.labels.tolist()
    assert dataset.describe(4).endswith("faces_vgg_112x112/train.rec key 1")
    np.testing.assert_array_equal(dataset[6][0], decode_image(jpeg(2, 0)))
    _fails("holds label 4, beyond num_classes=4", tmp_path, data_mode="concat", num_classes=4)


def test_synthetic_needs_no_path():
    dataset = open_dataset("/nowhere", "synthetic", num_classes=7)
    assert dataset.num_classes == 7 and dataset[8][1] == 1


def test_paths_that_hold_no_set(tmp_path):
    _fails("nowhere: no such file or folder", tmp_path / "nowhere")
    _fails("holds no training set: train.rec, imgs/, label.txt", tmp_path)
    make_tiny_set(tmp_path)
    (tmp_path / "train.rec").rename(tmp_path / "a.rec")
    (tmp_path / "train.idx").rename(tmp_path / "a.idx")
    assert len(open_dataset(tmp_path)) == len(open_dataset(tmp_path / "a.rec")) == 20
    (tmp_path / "b.rec").write_bytes(b"")
    _fails("holds 2 .rec files and none is train.rec", tmp_path)


# what lies about in folders


def test_links_in_a_circle_neither_multiply_the_set_nor_hang(tmp_path, caplog):
    plain = len(open_dataset(_image_folder(tmp_path / "imgs")))
    for name in ("a", "b"):
        (tmp_path / "imgs" / "2" / name).symlink_to(".")
        (tmp_path / "imgs" / "2" / f"up_{name}").symlink_to("..")
    assert len(open_dataset(tmp_path / "imgs")) == plain
    assert "a link to a folder that is in the set already: left out" in caplog.text
    (tmp_path / "imgs" / "again").symlink_to(".")  # a class that is the set itself
    _fails("again: this class folder holds no image", tmp_path)


def test_what_is_no_file_or_too_long_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "label.txt")  # reading it would wait for ever
    _fails("label.txt: no such file or folder", tmp_path / "label.txt")
    os.unlink(tmp_path / "label.txt")
    os.mkfifo(tmp_path / "a.jpg")
    _put(tmp_path / "b.jpg", jpeg(0, 0))
    with open(tmp_path / "c.jpg", "wb") as file:
        file.truncate(6 << 30)
    (tmp_path / "label.txt").write_text("b.jpg 0\na.jpg 0\nc.jpg 0\n")
    dataset = open_dataset(tmp_path)
    for index, match in ((1, "a.jpg: cannot be read .not a regular file"), (2, "c.jpg: is 6442450944 bytes long")):
        with pytest.raises(DamagedItem, match=match):
            dataset[index]


# a format of one's own


def test_a_format_of_ones_own(tmp_path, root, monkeypatch):
    """The example of docs/own_data.md, run: a dataset and a verification set in a format that is not the project's."""
    import data
    from data import pairs

    text = (root / "docs" / "own_data.md").read_text(encoding="utf-8")
    (tmp_path / "own_data.py").write_text(text.split("```python\n")[1].split("```")[0])
    faces_NHWC = np.stack([np.full((112, 112, 3), 30 * number, np.uint8) for number in range(6)])
    np.savez(tmp_path / "faces.npz", images=faces_NHWC, labels=np.arange(6) // 2)
    np.savez(tmp_path / "lfw.pairs.npz", images=faces_NHWC[:4], same=np.array([True, False]))
    monkeypatch.setattr(data, "FORMATS", list(data.FORMATS))
    monkeypatch.setattr(pairs, "FORMATS", list(pairs.FORMATS))
    config.load_plugins([str(tmp_path / "own_data.py")])
    for dataset in (open_dataset(tmp_path), open_dataset(tmp_path, "npz"), open_dataset(tmp_path / "faces.npz")):
        assert (len(dataset), dataset.num_classes) == (6, 3)
        assert dataset[5][1] == 2 and (dataset[5][0] == 150).all()
    batch = next(iter(data.build_loader(open_dataset(tmp_path), 6)))
    assert sorted(batch.labels_B.tolist()) == [0, 0, 1, 1, 2, 2]
    images, issame = pairs.load_pairs(pairs.find_pair_sets(tmp_path)["lfw"])
    assert (images[0:4] == faces_NHWC[:4]).all() and issame.tolist() == [True, False]
    with pytest.raises(DataError, match="there is one of this name already"):
        data.register("npz")(None)
