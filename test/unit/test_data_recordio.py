"""RecordIO: reading, writing, InsightFace's layout, and files that are not what they should be."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import struct

import numpy as np
import pytest
from tiny_set import jpeg, make_tiny_set
from workers_data import digest, write_records

from data import open_dataset
from data.insightface import RecordIODataset
from data.recordio import MAGIC, RecordIOReader, RecordIOWriter, pack, unpack
from runtime.errors import DamagedItem, DataError

pytestmark = pytest.mark.core

WORD = struct.pack("<I", MAGIC)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"a",
        b"abcd",
        b"abcde",
        WORD,
        WORD * 3,
        b"abcd" + WORD + b"efgh",
        b"ab" + WORD + b"cd",
        WORD + b"x",
        b"abcd" + WORD,
        b"a" * 4096 + WORD + WORD + b"b" * 5,
        b"abc" + WORD + b"d" + WORD,
    ],
)
def test_what_is_written_is_read(tmp_path, payload):
    rec = write_records(tmp_path, [b"before", payload, b"after"])
    reader = RecordIOReader(rec, tmp_path / "train.idx")
    assert [reader.read(key) for key in range(3)] == [b"before", payload, b"after"]
    assert list(RecordIOReader(rec)) == [b"before", payload, b"after"]  # without an index
    assert rec.stat().st_size % 4 == 0


def test_a_record_is_split_at_the_aligned_magic_word_only(tmp_path):
    rec = write_records(tmp_path, [b"abcd" + WORD + b"efgh", b"ab" + WORD + b"cd"])
    flags, offset, data = [], 0, rec.read_bytes()
    while offset < len(data):
        magic, lrec = struct.unpack_from("<II", data, offset)
        assert magic == MAGIC
        flags.append(lrec >> 29)
        offset += 8 + (lrec & (2**29 - 1)) + (-(lrec & (2**29 - 1)) % 4)
    assert flags == [1, 3, 0]


def test_labels_scalar_and_vector():
    assert unpack(pack(7, b"image"))[0] == (7.0,)
    labels, image = unpack(pack([3, 1.5], b"image"))
    assert labels == (3.0, 1.5) and bytes(image) == b"image"
    assert pack(7, b"image", key=9) == struct.pack("<IfQQ", 0, 7, 9, 0) + b"image"
    with pytest.raises(DataError, match="exact up to 16777216"):
        pack(2**24 + 1)


@pytest.mark.parametrize("payload", [b"short", struct.pack("<IfQQ", 0xFFFFFFFF, 0, 0, 0) + b"12345678"])
def test_a_header_that_does_not_fit_its_record(payload):
    with pytest.raises(DamagedItem):
        unpack(payload)


def test_insightface_layout(tmp_path):
    dataset = open_dataset(make_tiny_set(tmp_path, classes=3, shots=4))
    assert (len(dataset), dataset.num_classes) == (12, 3)
    assert dataset.labels.dtype == np.int64
    np.testing.assert_array_equal(dataset.labels, np.repeat([0, 1, 2], 4))
    image, label = dataset[5]
    assert image.shape == (112, 112, 3) and image.dtype == np.uint8 and label == 1
    assert dataset.describe(5).endswith("train.rec key 6")
    assert dataset[-1][1] == 2
    with pytest.raises(IndexError):
        dataset[12]


def test_without_header_every_key_is_an_image_in_order_of_keys(tmp_path):
    keys = [3, 0, 7, 5, 1]
    write_records(tmp_path, [pack(key % 2, jpeg(key % 2, key)) for key in keys], keys)
    dataset = open_dataset(tmp_path)
    assert [dataset.key(index) for index in range(5)] == [0, 1, 3, 5, 7]
    np.testing.assert_array_equal(dataset.labels, [0, 1, 1, 1, 1])
    assert [dataset[index][1] for index in range(5)] == dataset.labels.tolist()


def test_an_image_with_two_labels_at_key_0_is_no_header(tmp_path):
    write_records(tmp_path, [pack([label, 9], jpeg(label, 0)) for label in (0, 1)])
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 2 and dataset.labels.tolist() == [0, 1]


def test_identities_in_another_order_than_their_classes(tmp_path):
    images = [pack(label, jpeg(label, shot)) for label in (2, 0, 1) for shot in range(2)]
    write_records(tmp_path, [pack([7, 10]), *images, *(pack([first, first + 2]) for first in (1, 3, 5))])
    dataset = open_dataset(tmp_path)
    assert dataset.labels.tolist() == [2, 2, 0, 0, 1, 1] and dataset.num_classes == 3


def test_identity_records_that_do_not_tile_the_images_are_not_used(tmp_path):
    images = [pack(label, jpeg(label, shot)) for label in (0, 1) for shot in range(2)]
    write_records(tmp_path, [pack([5, 7]), *images, pack([1, 2]), pack([3, 5])])
    dataset = open_dataset(tmp_path)
    assert dataset.labels.tolist() == [0, 0, 1, 1] and dataset.num_classes == 2


def test_without_an_index_the_records_are_found(tmp_path):
    make_tiny_set(tmp_path)
    before = digest(open_dataset(tmp_path))
    (tmp_path / "train.idx").unlink()
    assert digest(open_dataset(tmp_path)) == before


def test_the_class_count_is_counted_and_said(tmp_path, caplog):
    make_tiny_set(tmp_path, classes=3)
    (tmp_path / "property").write_text("100,112,112")
    with caplog.at_level(logging.WARNING):
        assert open_dataset(tmp_path).num_classes == 3
    assert "says 100 classes, the records hold 3" in caplog.text
    assert open_dataset(tmp_path, num_classes=10).num_classes == 10


def test_a_set_without_identity_records_is_not_scanned_when_the_user_counts(tmp_path, monkeypatch):
    write_records(tmp_path, [pack(label, jpeg(label, 0)) for label in range(3)])
    monkeypatch.setattr(RecordIOReader, "first_labels", None)  # calling it fails
    dataset = open_dataset(tmp_path, num_classes=2)
    assert dataset[1][1] == 1
    with pytest.raises(DataError, match="key 2: label 2 is outside the 2 classes"):
        dataset[2]


def test_labels_survive_split_and_damaged_records(tmp_path):
    payloads = [pack(0, jpeg(0, 0)), pack(1, WORD + jpeg(1, 0)[4:]), pack([1, 0], jpeg(1, 1)), pack(1, jpeg(1, 2))]
    rec = write_records(tmp_path, payloads)
    data = bytearray(rec.read_bytes())
    offset = RecordIOReader(rec, tmp_path / "train.idx").offset(3)
    data[offset : offset + 4] = b"oops"
    rec.write_bytes(data)
    reader = RecordIOReader(rec, tmp_path / "train.idx")
    assert reader.first_labels(reader.offsets()).tolist() == [0, 1, 1, -1]


def test_a_damaged_first_image_does_not_change_its_class(tmp_path):
    images = [pack(label, jpeg(label, shot)) for label in (2, 0, 1) for shot in range(2)]
    rec = write_records(tmp_path, [pack([7, 10]), *images, *(pack([first, first + 2]) for first in (1, 3, 5))])
    data = bytearray(rec.read_bytes())
    data[RecordIOReader(rec, tmp_path / "train.idx").offset(3)] ^= 1
    rec.write_bytes(data)
    assert open_dataset(tmp_path).labels.tolist() == [2, 2, 1, 1, 1, 1]


def test_keys_beyond_float32_are_found(tmp_path, monkeypatch):
    # In sets of more than 2^24 images the header's numbers are rounded; here the limit is lowered instead.
    images = [pack(label, jpeg(label, shot)) for label in range(3) for shot in range(2)]
    people = [pack([first, first + 2]) for first in (1, 3, 5)]
    for announced in ([6, 9], [7, 10], [8, 12]):
        write_records(tmp_path, [pack(announced), *images, *people])
        monkeypatch.setattr("data.insightface.MAX_EXACT_LABEL", 4)
        monkeypatch.setattr("data.insightface.np.spacing", lambda value: np.float32(1))
        dataset = open_dataset(tmp_path)
        assert len(dataset) == 6 and dataset.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_identity_ranges_beyond_float32_cover_every_image():
    images = 2**24  # so the first identity key is 2^24 + 1, which float32 rounds

    class Reader:
        offsets = staticmethod(lambda first, stop: None)
        label_pairs = staticmethod(lambda offsets: np.array([[1, 3], [3, images + 1]], np.float32))
        first_labels = staticmethod(lambda offsets: np.array([0, 1]))

    dataset = RecordIODataset.__new__(RecordIODataset)
    dataset.reader, dataset._offsets = Reader(), np.zeros(3)
    labels, counts = dataset._read_identities(images + 1, images + 3)
    assert labels.tolist() == [0, 1] and counts.tolist() == [2, images - 2]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readable_in_forked_and_spawned_processes(tmp_path, method):
    dataset = open_dataset(make_tiny_set(tmp_path))
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        results = pool.map(digest, [dataset, dataset])
    assert results == [digest(dataset)] * 2


def test_pickled_without_its_map(tmp_path):
    dataset = open_dataset(make_tiny_set(tmp_path))
    text = pickle.dumps(dataset)
    assert len(text) < (tmp_path / "train.rec").stat().st_size / 2
    assert digest(pickle.loads(text)) == digest(dataset)


def test_the_writer_leaves_nothing_behind_on_an_error(tmp_path):
    with pytest.raises(KeyError):
        with RecordIOWriter(tmp_path / "a.rec", tmp_path / "a.idx") as writer:
            writer.write(0, b"x")
            raise KeyError
    assert list(tmp_path.iterdir()) == []


# Files that are not what they should be: one line, naming file and place.


def _fails(folder, match: str, **options) -> None:
    with pytest.raises(DataError, match=match) as caught:
        open_dataset(folder, **options)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_missing_path(tmp_path):
    _fails(tmp_path / "nothing", "no such file or folder")


def test_missing_rec_beside_its_index(tmp_path):
    make_tiny_set(tmp_path)
    (tmp_path / "train.rec").unlink()
    _fails(tmp_path, "holds no training set")
    with pytest.raises(DataError, match="train.rec: cannot be read"):
        RecordIOReader(tmp_path / "train.rec", tmp_path / "train.idx")


@pytest.mark.parametrize("name", ["train.rec", "train.idx"])
def test_empty_file(tmp_path, name):
    make_tiny_set(tmp_path)
    (tmp_path / name).write_bytes(b"")
    _fails(tmp_path, f"{name}: is empty")


def test_header_that_announces_no_image(tmp_path):
    write_records(tmp_path, [pack([1, 1])])
    _fails(tmp_path, "holds no image")


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_truncated_rec(tmp_path, keep):
    make_tiny_set(tmp_path)
    data = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(data[: int(len(data) * keep)])
    _fails(tmp_path, "past the end|cut off")


def test_truncated_rec_without_index(tmp_path):
    make_tiny_set(tmp_path)
    (tmp_path / "train.idx").unlink()
    data = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(data[: len(data) // 2])
    _fails(tmp_path, "cut off")


def test_index_past_the_end(tmp_path):
    make_tiny_set(tmp_path)
    with open(tmp_path / "train.idx", "a") as file:
        file.write("99\t123456789012\n")
    _fails(tmp_path, "key 99 is at byte 123456789012, past the end")


def test_wrong_magic(tmp_path):
    make_tiny_set(tmp_path)
    data = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(b"PK\3\4" + data[4:])
    _fails(tmp_path, "byte 0: wrong magic 0x04034B50")


def test_index_of_another_file(tmp_path):
    make_tiny_set(tmp_path / "a")
    make_tiny_set(tmp_path / "b", classes=3, shots=3)
    (tmp_path / "b" / "train.idx").replace(tmp_path / "a" / "train.idx")
    _fails(tmp_path / "a", "wrong magic .* belongs to another file")


@pytest.mark.parametrize("line", ["1 2 3", "x\t5", "7", "1\t2.5", "1\t-8"])
def test_index_line_that_is_not_two_numbers(tmp_path, line):
    make_tiny_set(tmp_path)
    lines = (tmp_path / "train.idx").read_text().splitlines()
    (tmp_path / "train.idx").write_text("\n".join([*lines[:3], line, *lines[3:]]))
    _fails(tmp_path, "train.idx line 4" if line != "1\t-8" else "train.idx.* write the index again")


def test_index_tolerates_blank_lines_and_line_ends(tmp_path):
    make_tiny_set(tmp_path)
    before = digest(open_dataset(tmp_path))
    lines = (tmp_path / "train.idx").read_text().splitlines()
    (tmp_path / "train.idx").write_bytes("\r\n\r\n".join(lines[::-1]).encode())
    assert digest(open_dataset(tmp_path)) == before


def test_index_longer_than_one_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("data.recordio._INDEX_CHUNK", 64)
    make_tiny_set(tmp_path)
    reader = RecordIOReader(tmp_path / "train.rec", tmp_path / "train.idx")
    lines = [line.split() for line in open(tmp_path / "train.idx")]
    assert [(key, reader.offset(key)) for key in reader.keys] == [(int(a), int(b)) for a, b in lines]
    with open(tmp_path / "train.idx", "a") as file:
        file.write("oops\n")
    _fails(tmp_path, f"line {len(lines) + 1}")


def test_key_twice(tmp_path):
    make_tiny_set(tmp_path)
    with open(tmp_path / "train.idx", "a") as file:
        file.write("3\t0\n")
    _fails(tmp_path, "key 3 occurs twice")


def test_header_announces_images_that_the_index_lacks(tmp_path):
    write_records(tmp_path, [pack([100, 101]), pack(0, jpeg(0, 0))])
    _fails(tmp_path, "lacks some of the keys 1 to 99")


@pytest.mark.parametrize("labels", [[0, 5], [9, 2], [float("nan"), 3], [1e9, 2e9]])
def test_header_out_of_its_mind(tmp_path, labels):
    head = struct.pack("<IfQQ2f", 2, 0, 0, 0, *labels)
    write_records(tmp_path, [head, pack(0, jpeg(0, 0))])
    _fails(tmp_path, "header record announces|lacks some of the keys")


def test_label_beyond_the_class_count(tmp_path):
    make_tiny_set(tmp_path, classes=4)
    _fails(tmp_path, "label 3, beyond num_classes=3", num_classes=3)
    with pytest.raises(DataError, match="num_classes 0: it must be at least 1"):
        open_dataset(tmp_path, num_classes=0)


@pytest.mark.parametrize("label", [float("nan"), float("inf"), -3.0])
def test_label_that_is_no_class(tmp_path, label):
    write_records(tmp_path, [struct.pack("<IfQQ", 0, value, 0, 0) + jpeg(0, 0) for value in (0.0, label)])
    dataset = open_dataset(tmp_path)
    with pytest.raises(DataError, match="key 1: label -[13] is outside"):
        dataset[1]


def test_no_record_holds_a_class(tmp_path):
    write_records(tmp_path, [struct.pack("<IfQQ", 0, float("nan"), 0, 0) + jpeg(0, 0)])
    _fails(tmp_path, "no record holds a class")


def test_damaged_record_in_the_middle_is_that_image_only(tmp_path):
    make_tiny_set(tmp_path, classes=10, shots=10)
    reader = RecordIOReader(tmp_path / "train.rec", tmp_path / "train.idx")
    data = bytearray((tmp_path / "train.rec").read_bytes())
    data[reader.offset(2)] ^= 1  # not one of the records that are looked at when opening
    (tmp_path / "train.rec").write_bytes(data)
    dataset = open_dataset(tmp_path)
    with pytest.raises(DamagedItem, match=r"train.rec key 2: byte \d+: wrong magic"):
        dataset[1]
    assert dataset[2][1] == 0


def test_split_record_that_ends_too_early(tmp_path):
    rec = write_records(tmp_path, [b"abcd" + WORD + b"efgh", b"next"])
    data = rec.read_bytes()
    rec.write_bytes(data[:12] + data[24:])  # without its last part
    (tmp_path / "train.idx").write_text("0\t0\n1\t12\n")
    reader = RecordIOReader(rec, tmp_path / "train.idx")
    with pytest.raises(DamagedItem, match="key 0: byte 12: the split record of byte 0 is not continued"):
        reader.read(0)
    with pytest.raises(DataError, match="no record with key 5"):
        reader.read(5)


def test_record_without_image(tmp_path):
    write_records(tmp_path, [pack(0, jpeg(0, 0)), pack(0), pack(0, jpeg(0, 1))])
    with pytest.raises(DamagedItem, match="key 1: the record holds no image"):
        open_dataset(tmp_path)[1]


def test_images_of_another_size(tmp_path):
    write_records(tmp_path, [pack(0, jpeg(0, shot, size=64)) for shot in range(2)])
    _fails(tmp_path, "key 0: images are 64x64, 112x112 is needed: align and crop")


def test_labels_out_of_any_range_end_at_once(tmp_path):
    huge = struct.pack("<IfQQ2f", 2, 0, 0, 0, 1e30, 2e30)  # the search for rounded keys would never end
    write_records(tmp_path, [huge, pack(0, jpeg(0, 0))])
    _fails(tmp_path, "header record announces")
    write_records(tmp_path, [struct.pack("<IfQQ", 0, label, 0, 0) + jpeg(0, 0) for label in (0.0, 1e30)])
    dataset = open_dataset(tmp_path)
    assert dataset.labels.tolist() == [0, -1] and dataset.num_classes == 1
    with pytest.raises(DataError, match="key 1: label -1 is outside"):
        dataset[1]
    with pytest.raises(DamagedItem, match="claims 5000 labels"):
        unpack(struct.pack("<IfQQ", 5000, 0, 0, 0) + bytes(20000))


@pytest.mark.parametrize("offset", [2**63 - 1, 2**63, 2**64, 10**400])
def test_offsets_beyond_any_file(tmp_path, offset):
    make_tiny_set(tmp_path)
    with open(tmp_path / "train.idx", "a") as file:
        file.write(f"999\t{offset}\n")
    _fails(tmp_path, "past the end|is not 'key<TAB>offset'")
