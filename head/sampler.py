"""Partial FC (arXiv 2203.15565): which of a rank's class centers take part in a step.

A step takes this batch's own classes and uniformly sampled others, `sample_rate` of the rank's rows together. They are
sampled on the host, ahead of the step that uses them: the device sorts nothing and waits for nothing. The cost is that
of the sampled rows, not of all of them; the result is a function of (seed, step, first row of the rank), so it is the
same after a resume and different on every rank.

What it means for the centers' SGD, where only sampled rows are updated (`head.centers`): a row that was not sampled
keeps its weight and its momentum as they are. So at sample_rate r a row is decayed, and its momentum fades, once every
1 / r steps and not at every step: weight decay acts as if it were r times as strong, and an old momentum pushes once,
when its row comes up again. arcface_torch moves and decays every row at every step, at the cost of touching all of
them: that is update_rows="all".
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np


class ClassSampler:
    """The rows of one rank that take part in a step.

    rows: how many the rank holds. first_row: the global number of the first: ranks differ by it."""

    AHEAD = 65536  # from so many rows on, the next step's are sampled in a thread beside this step

    def __init__(self, rows: int, sample_rate: float, seed: int, first_row: int):
        self.rows, self.sample_rate, self.seed, self.first_row = rows, sample_rate, seed, first_row
        self._thread, self._next = None, None  # (step, count), future

    def size(self, batch: int) -> int:
        """How many rows a step takes: sample_rate of them, but never fewer than a batch may have classes."""
        return min(self.rows, max(int(self.sample_rate * self.rows), batch))

    def __call__(self, column_B: np.ndarray, step: int) -> tuple:
        """column_B: int64, this rank's row of each sample's class, -1 where another rank holds it.

        -> (index_R: distinct row numbers in ascending order with all of this rank's positives among them, place_B:
        where each sample's class stands in index_R, -1 as before). index_R is None where all rows take part.
        """
        count = self.size(len(column_B))
        if count == self.rows:
            return None, column_B
        index_R, source = self._sample(step, count)
        own_B = column_B >= 0
        wanted = np.unique(column_B[own_B])
        there = index_R[np.searchsorted(index_R, wanted).clip(max=count - 1)] == wanted
        missing = wanted[~there]
        if len(missing):  # they take the places of others, any of which gives way with the same probability
            free = np.ones(count, dtype=bool)
            free[np.searchsorted(index_R, wanted[there])] = False
            leave = source.choice(np.flatnonzero(free), len(missing), replace=False, shuffle=False)
            index_R = np.delete(index_R, leave)
            index_R = np.insert(index_R, np.searchsorted(index_R, missing), missing)
        return index_R, np.where(own_B, np.searchsorted(index_R, column_B), -1)

    def _sample(self, step, count) -> tuple:
        known, future = self._next or (None, None)
        found = future.result() if known == (step, count) else sample_rows(self.rows, count, self._source(step))
        if count >= self.AHEAD:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="class sampler")
            ahead = self._thread.submit(sample_rows, self.rows, count, self._source(step + 1))
            self._next = (step + 1, count), ahead
        return found

    def _source(self, step) -> np.random.Generator:
        return np.random.default_rng([self.seed % 2**64, step, self.first_row])


def sample_rows(rows: int, count: int, source: np.random.Generator) -> tuple:
    """(`count` of 0..rows-1 in ascending order, each such set with the same probability; source). It costs O(count)."""
    if 2 * count > rows:  # rather those that stay out
        keep = np.ones(rows, dtype=bool)
        keep[sample_rows(rows, rows - count, source)[0]] = False
        return np.flatnonzero(keep), source
    found = np.empty(0, dtype=np.int64)
    while len(found) < count:
        # as many independent ones as have about that many values among them: those are a uniform set of their size
        tries = int(-rows * math.log1p((len(found) - count) / rows) * 1.02) + 16
        found = np.union1d(found, source.integers(rows, size=tries))
    surplus = source.choice(len(found), len(found) - count, replace=False, shuffle=False)
    return np.delete(found, surplus), source
