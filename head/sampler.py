"""Partial FC (arXiv 2203.15565): which of a rank's class centers take part in a step.

A step takes this batch's own classes and uniformly drawn others, `sample_rate` of the rank's rows together. The draw
is the start of a keyed pseudo-random permutation of the rows: its cost is that of the drawn rows, not of all of them;
it is a function of (seed, step, first row of the rank), so it is the same after a resume and different on every rank;
and it needs no word from the device to the host.

What it means for the centers' SGD, where only drawn rows are updated (`Centers`): a row that was not drawn keeps its
weight and its momentum as they are. So at sample_rate r a row is decayed, and its momentum fades, once every 1 / r
steps and not at every step: weight decay acts as if it were r times as strong, and an old momentum pushes once, when
its row comes up again. arcface_torch moves and decays every row at every step, at the cost of touching all of them:
that is update_rows="all".
"""

from __future__ import annotations

import functools
import math

import torch

_MASK = 2**32 - 1
ROUNDS = 6


class KeyedPermutation:
    """A bijection of 0..size-1 chosen by a key: a Feistel network over a * b >= size.

    a and b are chosen so that only a few points size..a*b-1 lie outside. A point that the network sends outside is
    sent on from there until it comes back inside (cycle walking); those few are found from the outside, by plain
    integers, so that tensors take one pass.
    """

    def __init__(self, size: int, key: int):
        if not 1 <= size < 2**36:
            raise ValueError(f"a permutation of {size} rows: 1 to 2^36 - 1 are possible")
        self.size = size
        self.a, self.b = _factors(size)
        self.keys = [_mix(_mix(key & _MASK) ^ _mix((key >> 32) + 0x9E3779B9 * (r + 1))) for r in range(ROUNDS)]
        self.detours = []  # (from, to): inside points whose image lies outside
        for outside in range(size, self.a * self.b):
            start = self._backward(outside)
            if start < size:
                end = self._forward(outside)
                while end >= size:
                    end = self._forward(end)
                self.detours.append((start, end))

    def forward(self, index_N: torch.Tensor) -> torch.Tensor:
        """int64 -> int64, the same shape."""
        out_N = self._forward(index_N)
        for start, end in self.detours:
            out_N = torch.where(index_N == start, torch.full_like(out_N, end), out_N)
        return out_N

    def inverse(self, index_N: torch.Tensor) -> torch.Tensor:
        out_N = self._backward(index_N)
        for start, end in self.detours:
            out_N = torch.where(index_N == end, torch.full_like(out_N, start), out_N)
        return out_N

    # The same lines for Python's integers and for int64 tensors.

    def _forward(self, index):
        left = _floor_divide(index, self.b)
        right = index - left * self.b
        for r, key in enumerate(self.keys):
            if r % 2:
                right = (right + _scaled(_mix(left ^ key), self.b)) % self.b
            else:
                left = (left + _scaled(_mix(right ^ key), self.a)) % self.a
        return left * self.b + right

    def _backward(self, index):
        left = _floor_divide(index, self.b)
        right = index - left * self.b
        for r, key in reversed(list(enumerate(self.keys))):
            if r % 2:
                right = (right - _scaled(_mix(left ^ key), self.b)) % self.b
            else:
                left = (left - _scaled(_mix(right ^ key), self.a)) % self.a
        return left * self.b + right


class Draw:
    """The rows of one rank that take part in a step.

    rows: how many the rank holds. first_row: the global number of the first: ranks differ by it."""

    def __init__(self, rows: int, sample_rate: float, seed: int, first_row: int):
        self.rows, self.sample_rate, self.seed, self.first_row = rows, sample_rate, seed, first_row

    def size(self, batch: int) -> int:
        """How many rows a step takes: sample_rate of them, but never fewer than a batch may have classes."""
        return min(self.rows, max(int(self.sample_rate * self.rows), batch))

    def __call__(self, column_B: torch.Tensor, step: int) -> tuple:
        """column_B: int64, this rank's row of each sample's class, -1 where another rank holds it.

        -> (index_R: distinct row numbers with all of this rank's positives among them, place_B: where each sample's
        class stands in index_R, -1 as before). index_R is None where all rows take part.
        """
        count = self.size(column_B.shape[0])
        if count == self.rows:
            return None, column_B
        permutation = KeyedPermutation(self.rows, _key(self.seed, step, self.first_row))
        index_R = permutation.forward(torch.arange(count, device=column_B.device))
        own_B = column_B >= 0
        place_B = permutation.inverse(column_B.clamp(min=0))
        drawn_B = own_B & (place_B < count)
        return _insert(index_R, column_B, place_B, own_B, drawn_B)


def _insert(index_R, column_B, place_B, own_B, drawn_B):
    """Puts the positives that were not drawn in place of negatives at the end of the draw.

    Shapes do not depend on the data, so nothing waits for the device. Which negatives give way depends on their place
    only, not on which they are: the ones that stay are as uniform as before.
    """
    count, batch = index_R.shape[0], column_B.shape[0]
    tail = min(count, 2 * batch)  # at most B places of it hold positives, at least B or all that are needed do not
    first = count - tail
    device = index_R.device
    # places in the tail, those free of positives first; one more place takes what is not meant
    in_tail_B = drawn_B & (place_B >= first)
    taken_T = torch.zeros(tail + 1, dtype=torch.int64, device=device)
    taken_T[torch.where(in_tail_B, place_B - first, torch.full_like(place_B, tail))] = 1
    position_T = torch.arange(tail, device=device)
    free_T = torch.sort(taken_T[:tail] * tail + position_T)[1]
    # missing classes in order, each distinct one with the next free place
    nothing = torch.iinfo(torch.int64).max
    wanted_B, order_B = torch.sort(torch.where(own_B & ~drawn_B, column_B, torch.full_like(column_B, nothing)))
    missing_B = wanted_B != nothing
    new_B = missing_B.clone()
    new_B[1:] &= wanted_B[1:] != wanted_B[:-1]
    number_B = (torch.cumsum(new_B, 0) - 1).clamp(0, tail - 1)
    slot_B = first + free_T[number_B]
    padded = torch.cat([index_R, index_R[:1]])
    padded[torch.where(missing_B, slot_B, torch.full_like(slot_B, count))] = wanted_B
    place_B = torch.where(own_B, place_B, torch.full_like(place_B, -1))
    place_B = place_B.scatter(0, order_B, torch.where(missing_B, slot_B, place_B[order_B]))
    return padded[:count], place_B


@functools.lru_cache(maxsize=64)
def _factors(size):
    """a * b >= size with both near its square root, and as few points too many as possible."""
    root = math.isqrt(size - 1) + 1
    pairs = ((a, -(-size // a)) for a in range(root, min(2 * root, root + 2**14)))
    return min(pairs, key=lambda pair: pair[0] * pair[1])


def _key(seed, step, first_row):
    """64 bits that differ with each of the three."""
    words = [seed & _MASK, (seed >> 32) & _MASK, step & _MASK, step >> 32, first_row & _MASK, first_row >> 32]
    low, high = 0x243F6A88, 0x85A308D3
    for word in words:
        low, high = _mix(low ^ (word & _MASK)), _mix(high + word * 0x3C6EF372 + low)
    return high << 32 | low


def _mix(x):
    """A 32-bit hash, of Python's integers or of int64 tensors: no product passes 63 bits."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & _MASK
    return x ^ (x >> 16)


def _scaled(hashed, size):
    """A 32-bit hash to 0..size-1 without a division."""
    return (hashed * size) >> 32


def _floor_divide(index, by):
    return torch.div(index, by, rounding_mode="floor") if torch.is_tensor(index) else index // by
