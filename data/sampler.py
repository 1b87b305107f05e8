"""Which image goes where: a pure function of (seed, epoch, position), the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from runtime.errors import DataError


def epoch_order(num_images: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(order, flips): a permutation of range(num_images) as int64, and a bool for each of its positions.

    RandomState, because its stream is frozen: a run resumed under another NumPy sees the same images.
    """
    random = np.random.RandomState([seed % 2**32, epoch])
    order = random.permutation(num_images)
    flips = np.frombuffer(random.bytes(num_images), np.uint8) < 128
    return order, flips


def balanced_order(labels: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(order, flips) as `epoch_order`, in which every class comes equally often, give or take one: rounds of all
    classes in a random order, each giving its next image; one that has shown all begins again."""
    random = np.random.RandomState([seed % 2**32, epoch, 1])
    shuffled = random.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]  # a class's images together, in a random order
    names, first, count = np.unique(labels[by_class], return_index=True, return_counts=True)
    rounds = -(-len(labels) // len(names))
    classes_RC = np.stack([random.permutation(len(names)) for _ in range(rounds)])
    place_RC = first[classes_RC] + np.arange(rounds)[:, None] % count[classes_RC]
    flips = np.frombuffer(random.bytes(len(labels)), np.uint8) < 128
    return by_class[place_RC.reshape(-1)[: len(labels)]], flips


class BatchSampler:
    """The batches of one rank.

    Step t of an epoch takes the global positions [t*N*b, (t+1)*N*b) of the epoch's order, rank r the r-th run of b
    of them, so N ranks of b images together take exactly what one rank of N*b takes. The last global batch that is not
    full is dropped: every rank takes the same number of steps, and shapes stay fixed.
    """

    def __init__(
        self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0, labels=None
    ):
        if batch_size < 1:
            raise DataError(f"batch_size {batch_size}: it must be at least 1")
        self.num_images, self.batch_size, self.rank, self.world_size, self.seed = (
            num_images,
            batch_size,
            rank,
            world_size,
            seed,
        )
        self._labels = labels  # of every image, where classes are to come equally often
        self.global_batch = batch_size * world_size
        self.steps = num_images // self.global_batch
        if self.steps == 0:
            raise DataError(
                f"batch of {world_size} x {batch_size} = {self.global_batch} images is larger than the set "
                f"of {num_images}: choose a batch size of at most {num_images // world_size}"
            )

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(indices int64 [b], flips bool [b]) of this rank, from `first_step` to the end of the epoch."""
        if self._labels is None:
            order, flips = epoch_order(self.num_images, self.seed, epoch)
        else:
            order, flips = balanced_order(self._labels, self.seed, epoch)
        for step in range(first_step, self.steps):
            begin = step * self.global_batch + self.rank * self.batch_size
            yield order[begin : begin + self.batch_size], flips[begin : begin + self.batch_size]
