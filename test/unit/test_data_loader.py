"""The loader: who gets which image, what happens to damaged ones, and how a batch becomes the network's input."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from tiny_set import jpeg, make_tiny_set
from workers_data import write_records

import data.loader
from data import build_loader, open_dataset
from data.dataset import ImageDataset
from data.recordio import RecordIOReader, pack
from data.sampler import BatchSampler, epoch_order
from data.synthetic import SyntheticDataset
from data.transforms import to_input
from runtime.errors import DamagedItem, DataError

pytestmark = pytest.mark.core

ORDER = [4, 7, 8, 1, 6, 9, 3, 5, 2, 11, 10, 0]
FLIPS = "000000011000"


class Numbers(ImageDataset):
    """Image i is filled with i; those in `damaged` cannot be read."""

    num_classes = 10

    def __init__(self, count: int, damaged=(), labels=None):
        super().__init__(size=4)
        self.count, self.damaged = count, set(damaged)
        self._labels = np.arange(count) % 10 if labels is None else np.array(labels)

    labels = property(lambda self: self._labels)

    def __len__(self):
        return self.count

    def describe(self, index):
        return f"numbers {index}"

    def load_into(self, index, out_HWC):
        if index in self.damaged:
            raise DamagedItem(f"{self.describe(index)}: torn")
        out_HWC[...] = index % 256
        return int(self.labels[index])


def _run(loader) -> list:
    return [
        (batch.images_BHWC[:, 0, 0, 0].tolist(), batch.labels_B.tolist(), batch.flip_B.tolist(), batch.damaged)
        for batch in loader
    ]


# Order


def test_the_order_is_the_same_under_any_numpy():
    # written down once: a checkpoint moves between versions, and its epoch goes on in the same order
    order, flips = epoch_order(12, seed=7, epoch=3)
    assert order.tolist() == ORDER and "".join("01"[int(flip)] for flip in flips) == FLIPS
    assert order.dtype == np.int64 and flips.dtype == bool


def test_an_epoch_is_a_permutation_and_none_is_like_another():
    orders = [epoch_order(500, seed, epoch)[0] for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**31, 0), (-1, 0))]
    for order in orders:
        assert sorted(order) == list(range(500))
    assert len({tuple(order) for order in orders}) == 5
    flips = np.concatenate([epoch_order(500, 0, epoch)[1] for epoch in range(20)])
    assert abs(flips.mean() - 0.5) < 0.02  # 4 sigma


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_n_ranks_together_see_what_one_rank_sees(world_size):
    dataset = Numbers(203)
    one = build_loader(dataset, 4 * world_size, seed=5)
    ranks = [build_loader(dataset, 4, rank, world_size, seed=5) for rank in range(world_size)]
    assert {len(loader) for loader in ranks} == {len(one)} == {203 // (4 * world_size)}
    for epoch in range(2):
        for loader in [one, *ranks]:
            loader.set_position(epoch)
        for whole, *parts in zip(one, *ranks):
            for field in ("images_BHWC", "labels_B", "flip_B"):
                assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))


def test_batches_are_whole_and_typed():
    batches = list(build_loader(Numbers(23), 5))
    assert len(batches) == 4
    for batch in batches:
        assert batch.images_BHWC.shape == (5, 4, 4, 3) and batch.images_BHWC.dtype == torch.uint8
        assert batch.labels_B.dtype == torch.int64 and batch.flip_B.dtype == torch.bool
        assert torch.equal(batch.labels_B, batch.images_BHWC[:, 0, 0, 0].long() % 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_the_middle_of_an_epoch(workers):
    loader = build_loader(Numbers(60), 4, seed=1, num_workers=workers)
    loader.set_position(2)
    whole = _run(loader)
    assert _run(loader) == whole and len(whole) == len(loader) == 15  # iterating does not move the position
    loader.set_position(2, 9)
    assert _run(loader) == whole[9:]
    loader.set_position(2, 15)
    assert _run(loader) == []
    loader.set_position(3)
    assert _run(loader) != whole
    with pytest.raises(DataError, match="an epoch of this set has 15 steps"):
        loader.set_position(2, 16)


def test_workers_change_nothing_and_stay(tmp_path):
    dataset = open_dataset(make_tiny_set(tmp_path))
    alone, helped = build_loader(dataset, 3), build_loader(dataset, 3, num_workers=2)
    for epoch in range(2):
        for loader in (alone, helped):
            loader.set_position(epoch)
        for expected, batch in zip(alone, helped):
            assert all(torch.equal(a, b) for a, b in zip(expected[:3], batch[:3]))
    # a pass that is given up in its middle leaves nothing behind for the next one
    whole = _run(alone)
    iterator = iter(helped)
    next(iterator)
    del iterator
    assert _run(helped) == whole


def test_batch_larger_than_the_set():
    with pytest.raises(DataError, match="batch of 4 x 8 = 32 images is larger than the set of 31: .* at most 7"):
        build_loader(Numbers(31), 8, 0, 4)
    assert len(build_loader(Numbers(32), 8, 3, 4)) == 1
    with pytest.raises(DataError, match="batch_size 0"):
        BatchSampler(10, 0)


def test_importing_the_readers_does_not_load_torch():
    import subprocess
    import sys

    code = "import sys, data, data.pairs, data.synthetic; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Damage


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_replaced_by_one_of_its_class(workers, caplog):
    dataset = Numbers(200, damaged=[17, 27])  # 37 is the next of class 7
    loader = build_loader(dataset, 20, num_workers=workers)
    with caplog.at_level(logging.WARNING):
        images, labels, _, damaged = zip(*_run(loader))
    assert sum(damaged) == loader.damaged == 2
    images = np.concatenate(images)
    assert sorted(images) == sorted([*(set(range(200)) - {17, 27}), 37, 37])
    np.testing.assert_array_equal(np.concatenate(labels), images % 10)
    assert "damaged image numbers 17: torn; numbers 37 takes its place" in caplog.text
    assert "damaged image numbers 27: torn; numbers 37 takes its place" in caplog.text
    _run(loader)
    assert loader.damaged == 4


def test_the_last_of_a_class_is_replaced_by_the_first():
    images = np.concatenate([images for images, *_ in _run(build_loader(Numbers(200, damaged=[199]), 20))])
    assert sorted(images) == sorted([*range(199), 9])


def test_a_class_of_one_is_replaced_by_another_with_its_own_label():
    labels = [9] + [3] * 199
    loader = build_loader(Numbers(200, damaged=[0], labels=labels), 20)
    assert {label for _, labels, _, _ in _run(loader) for label in labels} == {3}


def test_replacing_is_the_same_on_every_rank():
    dataset = Numbers(400, damaged=[5, 105])
    one = np.concatenate([images for images, *_ in _run(build_loader(dataset, 20))])
    ranks = [_run(build_loader(dataset, 10, rank, 2)) for rank in range(2)]
    np.testing.assert_array_equal(one, np.concatenate([a[0] + b[0] for a, b in zip(*ranks)]))


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_stops_at_the_first(workers):
    with pytest.raises(DataError, match="^numbers 17: torn$"):
        _run(build_loader(Numbers(200, damaged=[17]), 20, num_workers=workers, strict=True))


def test_more_than_one_percent_stops_the_run():
    assert sum(damaged for *_, damaged in _run(build_loader(Numbers(200, damaged=range(2)), 10))) == 2
    with pytest.raises(DataError, match="3 damaged images, more than 1% of the 200 of an epoch, .*needs repair"):
        _run(build_loader(Numbers(200, damaged=range(3)), 10))


def test_everything_damaged():
    with pytest.raises(DataError, match="damaged, and so is everything near it"):
        _run(build_loader(Numbers(200, damaged=range(200)), 10))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_beyond_the_class_count_is_not_replaced(tmp_path, workers):
    write_records(tmp_path, [pack(label, jpeg(label, 0)) for label in (0, 1, 5)])
    loader = build_loader(open_dataset(tmp_path, num_classes=2), 3, num_workers=workers)
    with pytest.raises(DataError, match="^[^\n]*train.rec key 2: label 5 is outside the 2 classes[^\n]*$"):
        _run(loader)


def test_damaged_jpegs_of_a_rec(tmp_path, caplog):
    make_tiny_set(tmp_path, classes=20, shots=15)
    reader = RecordIOReader(tmp_path / "train.rec", tmp_path / "train.idx")
    data = bytearray((tmp_path / "train.rec").read_bytes())
    data[reader.offset(5) + 200 : reader.offset(5) + 260] = bytes(60)  # the JPEG
    data[reader.offset(40)] ^= 255  # the record
    data[reader.offset(80) + 4 : reader.offset(80) + 8] = b"\xff\xff\xff\x1f"  # its length
    (tmp_path / "train.rec").write_bytes(data)
    loader = build_loader(open_dataset(tmp_path), 10)
    with caplog.at_level(logging.WARNING):
        labels = np.concatenate([labels for _, labels, _, _ in _run(loader)])
    assert loader.damaged == 3 and np.bincount(labels).tolist() == [15] * 20
    for key in (5, 40, 80):
        assert f"train.rec key {key}: " in caplog.text


# Input


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_to_input_is_to_tensor_and_normalize(memory_format):
    images_BHWC = torch.arange(2 * 16 * 8 * 3).remainder(256).to(torch.uint8).view(2, 16, 8, 3)
    expected = images_BHWC.permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
    out = to_input(images_BHWC, memory_format=memory_format)
    assert torch.equal(out, expected) and out.is_contiguous(memory_format=memory_format)
    assert torch.equal(to_input(images_BHWC, channel_order="bgr"), expected.flip(1))
    flip = torch.tensor([True, False])
    assert torch.equal(to_input(images_BHWC, flip), torch.stack([expected[0].flip(2), expected[1]]))
    for dtype in (torch.float16, torch.bfloat16):
        out = to_input(images_BHWC, dtype=dtype, memory_format=memory_format)
        assert torch.equal(out, expected.to(dtype)) and out.is_contiguous(memory_format=memory_format)
    exact = images_BHWC.permute(0, 3, 1, 2).double().div(255).sub(0.5).div(0.5)
    assert torch.equal(to_input(images_BHWC, dtype=torch.float64), exact)


def test_to_input_leaves_its_argument_alone():
    images_BHWC = torch.full((1, 4, 4, 3), 200, dtype=torch.uint8)
    before = images_BHWC.clone()
    to_input(images_BHWC, torch.tensor([True]))
    assert torch.equal(images_BHWC, before)


def test_synthetic_dataset():
    one, two = SyntheticDataset(1000, 7, size=20, seed=3), SyntheticDataset(1000, 7, size=20, seed=3)
    assert len(one) == 1000 and one[0][0].shape == (20, 20, 3)
    np.testing.assert_array_equal(one[123][0], two[123][0])
    assert one[123][1] == 123 % 7 == one.labels[123]
    assert (one[0][0] != one[1][0]).any() and (one[0][0] != SyntheticDataset(1000, 7, size=20, seed=4)[0][0]).any()
    with pytest.raises(DataError, match="0 images in 7 classes"):
        SyntheticDataset(0, 7)


@pytest.mark.parametrize(
    "version, kind, pinned, named",
    [
        ("2.1.0", "npu", True, "npu"),
        ("2.6.0+cpu", "npu", True, "npu"),
        ("2.7.1", "npu", True, None),
        ("2.1.0", "cuda", True, None),
        ("2.1.0", "cpu", False, None),
    ],
)
def test_memory_is_pinned_for_the_device_that_copies_from_it(monkeypatch, version, kind, pinned, named):
    """Before 2.7 torch's loader pins for CUDA alone unless it is told the device's name, and says nothing."""
    told = {}

    class Told:
        def __init__(self, *_, pin_memory_device=None, **options):
            told.update(options, pin_memory_device=pin_memory_device)

    monkeypatch.setattr(data.loader, "DataLoader", Told)
    monkeypatch.setattr(torch, "__version__", version)
    build_loader(Numbers(20), 4, pin_memory=kind)
    assert (told["pin_memory"], told["pin_memory_device"]) == (pinned, named)


def test_a_worker_that_is_killed_is_one_line():
    loader = build_loader(SyntheticDataset(400, 4), 4, num_workers=1)
    batches = iter(loader)
    next(batches)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a loader process is gone .*Lower --num_workers and resume"):
        for _batch in batches:
            pass
