"""Which contiguous rows of a long table (class centers) one rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowShard:
    """Rows start (inclusive) to stop (exclusive) of total. One rank holds them all: the trivial shard."""

    start: int
    stop: int
    total: int

    def __post_init__(self):
        if not 0 <= self.start <= self.stop <= self.total:
            raise ValueError(f"rows {self.start}:{self.stop} do not lie within 0:{self.total}")

    @classmethod
    def of(cls, total: int, rank: int = 0, size: int = 1) -> RowShard:
        """The part of `rank` when `size` ranks share `total` rows: the first total % size ranks hold one more."""
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} does not exist among {size}")
        share, extra = divmod(total, size)
        start = rank * share + min(rank, extra)
        return cls(start, start + share + (rank < extra), total)

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def owns(self, index_B: torch.Tensor) -> torch.Tensor:
        """[B] bool: True where the global row number belongs to this shard."""
        return (index_B >= self.start) & (index_B < self.stop)

    def local(self, index_B: torch.Tensor) -> torch.Tensor:
        """Global row numbers -> row numbers within this shard; meaningful only where owns() holds."""
        return index_B - self.start
