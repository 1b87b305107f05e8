"""Batches of uint8 images from any `ImageDataset`, decoded in worker processes.

Workers hold no randomness: the main process tells them which images to read. What goes wrong in a worker comes back
as data, so that the user gets one line and not the trace of two processes.
"""

from __future__ import annotations

import inspect
import logging
import signal
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.dataset import ImageDataset
from data.sampler import BatchSampler
from runtime.errors import DamagedItem, DataError, printable

log = logging.getLogger(__name__)

MAX_DAMAGED = 0.01  # share of an epoch's images beyond which a run stops


class Batch(NamedTuple):
    """What one step trains on."""

    images_BHWC: torch.Tensor  # uint8, RGB, not flipped
    labels_B: torch.Tensor  # int64
    flip_B: torch.Tensor  # bool: mirror this image (data.transforms.to_input does)
    damaged: int  # images of this batch that another image stands in for


class _Fetched(NamedTuple):
    images_BHWC: torch.Tensor
    labels_B: torch.Tensor
    flip_B: torch.Tensor
    problems: list  # of str: what was replaced
    error: str  # not empty: nothing here can be used


class _BatchReader(Dataset):
    """Lives in the workers; its "index" is (image indices, flips) of a whole batch."""

    def __init__(self, dataset: ImageDataset, strict: bool):
        self.dataset, self.strict = dataset, strict

    def __getitem__(self, batch: tuple[np.ndarray, np.ndarray]) -> _Fetched:
        indices, flips = batch
        images_BHWC = torch.empty((len(indices), *self.dataset.size, 3), dtype=torch.uint8)
        labels_B = torch.empty(len(indices), dtype=torch.int64)
        rows, problems, error = images_BHWC.numpy(), [], ""
        try:
            for row, index in enumerate(indices.tolist()):
                try:
                    labels_B[row] = self.dataset.load_into(index, rows[row])
                except DamagedItem as damage:
                    if self.strict:
                        raise
                    labels_B[row], stand_in = self._replace(index, rows[row])
                    problems.append(printable(f"{damage}; {stand_in} takes its place"))
        except DataError as failure:
            error = str(failure)
        return _Fetched(images_BHWC, labels_B, torch.from_numpy(flips.copy()), problems, error)

    def _replace(self, index: int, out_HWC: np.ndarray) -> tuple[int, str]:
        """Load another image of the same class, the nearest after `index`; of any class where there is none."""
        labels = self.dataset.labels
        same = np.flatnonzero(labels == labels[index])
        after = np.searchsorted(same, index, side="right")
        others = [*same[after:], *same[:after]]
        others += [(index + step) % len(labels) for step in range(1, 101)]
        for other in others:
            if other != index:
                try:
                    return self.dataset.load_into(int(other), out_HWC), self.dataset.describe(int(other))
                except DamagedItem:
                    continue
        raise DataError(f"{self.dataset.describe(index)}: damaged, and so is everything near it: check the data set")


class _Positions(Sampler):
    """Hands the batches from the loader's position on to the workers. Read anew by every pass of the DataLoader."""

    def __init__(self, batches: BatchSampler):
        self.sampler, self.epoch, self.step = batches, 0, 0

    def __iter__(self) -> Iterator:
        return self.sampler.batches(self.epoch, self.step)

    def __len__(self) -> int:
        return self.sampler.steps - self.step


def _identity(batch):
    return batch


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches the whole process group; only the main process decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Loader:
    """Iterates from the current position to the end of its epoch; `set_position` moves it, iterating does not.

    len(): steps per epoch, the same on every rank. damaged: images replaced so far, over all passes.
    pin_memory: the kind of device ("cuda", "npu") that copies from pinned memory; "" or "cpu" pins nothing.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        strict: bool = False,
        pin_memory: str = "",
        class_balanced: bool = False,
    ):
        self.dataset = dataset
        self.damaged = 0
        self._sampler = BatchSampler(
            len(dataset), batch_size, rank, world_size, seed, dataset.labels if class_balanced else None
        )
        self._positions = _Positions(self._sampler)
        self._loader = DataLoader(
            _BatchReader(dataset, strict),
            sampler=self._positions,
            batch_size=None,
            collate_fn=_identity,
            num_workers=num_workers,
            worker_init_fn=_start_worker,
            **_pinning(pin_memory),
            persistent_workers=num_workers > 0,
            # each pass draws a seed for its workers: from a generator of its own, so that a pass begun in the middle
            # of an epoch leaves training's random numbers as they were
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return self._sampler.steps

    def set_position(self, epoch: int, step: int = 0) -> None:
        """Continue at `step` (0 .. len) of `epoch`; both count from 0."""
        if not 0 <= step <= len(self) or epoch < 0:
            raise DataError(
                f"position epoch {epoch} step {step}: an epoch of this set has {len(self)} steps; "
                "was the batch size or the number of ranks changed?"
            )
        self._positions.epoch, self._positions.step = epoch, step

    def _fetch(self) -> Iterator[_Fetched]:
        on_child = signal.getsignal(signal.SIGCHLD)
        batches = iter(self._loader)
        if threading.current_thread() is threading.main_thread():
            # torch's own handler would raise in the middle of whatever runs when a worker dies; next() finds it out too
            signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)
        while True:
            try:
                fetched = next(batches)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError) as error:
                if not self._loader.num_workers or "Caught" in str(error):  # a fault of ours, with the worker's trace
                    raise
                raise DataError(
                    f"a loader process is gone ({error or 'in the middle of a batch'}): was it killed for the "
                    "machine's memory? Lower --num_workers and resume"
                ) from None
            yield fetched

    def __iter__(self) -> Iterator[Batch]:
        damaged = 0
        images = len(self) * self._sampler.batch_size
        for fetched in self._fetch():
            if fetched.error:
                raise DataError(fetched.error)
            for problem in fetched.problems:
                log.warning("damaged image %s", problem)
            damaged += len(fetched.problems)
            self.damaged += len(fetched.problems)
            if damaged > MAX_DAMAGED * images:
                raise DataError(
                    f"{damaged} damaged images, more than {MAX_DAMAGED:.0%} of the {images} of an epoch, "
                    f"the last: {fetched.problems[-1]}: the data set needs repair"
                )
            yield Batch(fetched.images_BHWC, fetched.labels_B, fetched.flip_B, len(fetched.problems))


def _pinning(kind: str) -> dict:
    """DataLoader's options. Before torch 2.7 it pins for CUDA alone unless it is told the device's name."""
    options = {"pin_memory": kind not in ("", "cpu")}
    takes_name = "pin_memory_device" in inspect.signature(DataLoader.__init__).parameters  # torch 1.12
    if kind not in ("", "cpu", "cuda") and takes_name and _torch_version() < (2, 7):
        options["pin_memory_device"] = kind
    return options


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)
