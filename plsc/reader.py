"""Readers as PLSC's users write them: generators of (float image [C, H, W], label), put into batches."""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from collections.abc import Iterator
from typing import Callable, NamedTuple

import numpy as np
import torch

from runtime.dist import World
from runtime.errors import DataError

log = logging.getLogger("plsc")

AHEAD = 4  # batches that are read while the network computes
ENDLESS = 1 << 62  # steps of an epoch whose end is not known


def batch(reader: Callable, batch_size: int, drop_last: bool = False) -> Callable:
    """A reader of lists of `batch_size` samples, from a reader of samples; the last one may be shorter."""
    if batch_size <= 0:
        raise ValueError(f"batch_size should be a positive integer, but got {batch_size}")

    def batched():
        samples = []
        for sample in reader():
            samples.append(sample)
            if len(samples) == batch_size:
                yield samples
                samples = []
        if samples and not drop_last:
            yield samples

    return batched


class ReaderBatch(NamedTuple):
    images_BCHW: torch.Tensor  # float32, as the reader gave them
    labels_B: torch.Tensor  # int64


class ReaderLoader:
    """What `Learner` takes its batches from, over a user's reader: called anew each epoch, read ahead in a thread.

    Every rank runs the reader by itself. They stop together, where the first of them ends; `ended(steps)` is called
    with an epoch's last batch, before it is trained on. Raises DataError for a sample that is no image and label.
    """

    damaged = 0

    def __init__(self, reader: Callable, num_classes: int, world: World, ended: Callable[[int], None]):
        self.reader, self.num_classes, self.world, self.ended = reader, num_classes, world, ended
        self._compared = False

    def set_position(self, epoch: int, step: int = 0) -> None:
        if step:
            raise DataError(f"a reader begins at its beginning: it cannot go on at step {step} of an epoch")
        self.ended(ENDLESS)

    def __iter__(self) -> Iterator[ReaderBatch]:
        batches = _ahead(self.reader, self._tensors)
        current, steps = self._next(batches), 0
        if current is None:
            raise DataError("train_reader gives no batch: is the list of images empty?")
        self._compare(current)
        while current is not None:
            following, steps = self._next(batches), steps + 1
            if following is None:
                self.ended(steps)
            yield current
            current = following

    def _next(self, batches):
        """The next batch; None on all ranks as soon as one has none."""
        one = next(batches, None)
        if self.world.size > 1:
            there = torch.tensor(one is not None, dtype=torch.int64, device=self.world.device)
            if not int(self.world.all_reduce_(there, "min")):
                return None
        return one

    def _compare(self, first: ReaderBatch) -> None:
        if self.world.size > 1 and not self._compared:
            self._compared = True
            digest = hashlib.sha256(first.images_BCHW.numpy().tobytes()).hexdigest()
            if len(set(self.world.all_gather_object(digest))) < self.world.size and self.world.is_main:
                log.warning(
                    "train_reader gives several ranks the same images: divide them by PADDLE_TRAINER_ID and "
                    "PADDLE_TRAINERS_NUM, or shuffle them otherwise on each rank"
                )

    def _tensors(self, samples) -> ReaderBatch:
        try:
            images = np.stack([np.asarray(image, np.float32) for image, _label in samples])
            labels = np.array([int(np.asarray(label).reshape(())) for _image, label in samples], np.int64)
        except (TypeError, ValueError) as error:
            raise DataError(f"train_reader: a sample is not (float image [C, H, W], label): {error}") from None
        if images.ndim != 4:
            raise DataError(f"train_reader: an image has shape {list(images.shape[1:])}, and [C, H, W] is needed")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise DataError(f"train_reader: label {wrong} is outside the {self.num_classes} classes (set_class_num)")
        return ReaderBatch(torch.from_numpy(images), torch.from_numpy(labels))


def _ahead(reader: Callable, convert: Callable) -> Iterator:
    """convert(batch) for the batches of reader(), made in a thread of their own."""
    made: queue.Queue = queue.Queue(AHEAD)
    stopped = threading.Event()

    def run():
        try:
            for samples in reader():
                item = convert(samples)
                while not stopped.is_set():
                    try:
                        made.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if stopped.is_set():
                    return
            made.put(None)
        except BaseException as error:  # raised again where it is waited for
            made.put(error)

    threading.Thread(target=run, name="train_reader", daemon=True).start()
    try:
        while True:
            item = made.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
