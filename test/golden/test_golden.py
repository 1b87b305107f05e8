"""Files that the original tools wrote are read exactly, and written again byte for byte.

The golden files and the real sets stand in the folder `shared` beside the project; without it these tests skip.
"""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
from PIL import Image

from data import build_loader, open_dataset
from data.images import decode_image
from data.pairs import find_pair_sets, load_pairs, read_bin
from data.recordio import RecordIOReader, RecordIOWriter, pack, unpack

pytestmark = pytest.mark.core

RECORDS = ["golden/mxnet_recordio", "real/lfw_small", "real/adaface_mini_rec"]


def test_mxnet_split_record(shared):
    records = list(RecordIOReader(shared / "golden" / "mxnet_recordio" / "magic.rec"))
    assert records == [b"abcd" + b"\x0a\x23\xd7\xce" + b"efgh", b"xxxxx"]


def test_mxnet_training_set(shared, caplog):
    folder = shared / "golden" / "mxnet_recordio"
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(folder)
    assert (len(dataset), dataset.num_classes) == (9, 3)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert not caplog.records  # 3 classes are what `property` says
    reader = RecordIOReader(folder / "train.rec", folder / "train.idx")
    assert unpack(reader.read(0))[0] == (10, 13)
    for index in range(9):
        image_HWC, label = dataset[index]
        labels, data = unpack(reader.read(index + 1))
        assert len(labels) == (1 if index + 1 in (3, 6, 9) else 2) and labels[0] == label == dataset.labels[index]
        np.testing.assert_array_equal(image_HWC, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("folder", RECORDS)
def test_written_again_byte_for_byte(shared, tmp_path, folder):
    rec, idx = shared / folder / "train.rec", shared / folder / "train.idx"
    reader = RecordIOReader(rec, idx)
    in_file_order = sorted(reader.keys.tolist(), key=reader.offset)
    with RecordIOWriter(tmp_path / "train.rec", tmp_path / "train.idx") as writer:
        for key in in_file_order:
            writer.write(key, reader.read(key))
    assert (tmp_path / "train.rec").read_bytes() == rec.read_bytes()
    assert (tmp_path / "train.idx").read_bytes() == idx.read_bytes()


def test_headers_packed_again_byte_for_byte(shared):
    folder = shared / "real" / "lfw_small"
    reader = RecordIOReader(folder / "train.rec", folder / "train.idx")
    for key in (0, 1, 17, 2580):
        payload = reader.read(key)
        labels, image = unpack(payload)
        record_id = int.from_bytes(payload[8:16], "little")
        assert pack(labels, bytes(image), record_id) == payload


def test_lfw_small(shared):
    dataset = open_dataset(shared / "real" / "lfw_small")
    assert (len(dataset), dataset.num_classes) == (2579, 260)
    counts = np.bincount(dataset.labels)
    assert counts.max() == 20 and counts.min() >= 1 and counts.sum() == 2579
    from_images = dataset.reader.first_labels(dataset.reader.offsets(1, 2580))
    np.testing.assert_array_equal(dataset.labels, from_images)  # dataset.labels are from the identity records
    images, issame = load_pairs(find_pair_sets(shared / "real" / "lfw_small")["lfw"])
    assert len(images) == 2000 and issame.sum() == 500
    assert images[1990:2010].shape == (10, 112, 112, 3)


def test_adaface_mini_rec_has_shuffled_keys(shared):
    folder = shared / "real" / "adaface_mini_rec"
    dataset = open_dataset(folder)
    assert (len(dataset), dataset.num_classes) == (8, 2)
    by_key = {int(line.split("\t")[0]): line.rstrip("\n").split("\t")[1:] for line in open(folder / "train.lst")}
    for index in range(8):
        label, name = by_key[dataset.key(index)]
        assert dataset[index][1] == int(label) == dataset.labels[index]
        # im2rec encoded the image again, so it is near its source and not equal to it
        source_HWC = decode_image((folder / "images" / name.split("/")[1]).read_bytes()).astype(int)
        others = [np.abs(dataset[other][0] - source_HWC).mean() for other in range(8)]
        assert int(np.argmin(others)) == index


def test_arcface_paddles_small_set(shared):
    dataset = open_dataset(shared / "real" / "tipc" / "small_dataset")
    assert dataset.labels.tolist() == list(range(10)) and dataset.num_classes == 10
    assert dataset.describe(9).endswith("images/00000672.jpg")
    path = shared / "real" / "tipc" / "small_lfw.bin"
    images, issame = load_pairs(path)
    assert len(images) == 20 and issame.tolist() == [True] * 10
    encoded = read_bin(path)[0]
    for row in (0, 19):
        np.testing.assert_array_equal(images[row], np.asarray(Image.open(io.BytesIO(encoded[row])).convert("RGB")))


@pytest.mark.parametrize(
    "folder, batch_size",
    [
        ("real/lfw_small", 64),
        ("real/tipc/small_dataset", 5),
        ("real/adaface_mini_rec", 4),
        ("golden/mxnet_recordio", 3),
    ],
)
def test_every_real_set_loads_whole(shared, folder, batch_size):
    loader = build_loader(open_dataset(shared / folder), batch_size)
    batches = list(loader)
    assert len(batches) == len(loader) == len(loader.dataset) // batch_size
    assert loader.damaged == 0
