"""Row shards: together they are every row once."""

from __future__ import annotations

import pytest
import torch

from runtime.shard import RowShard

pytestmark = pytest.mark.core


@pytest.mark.parametrize("total", [0, 1, 7, 8, 9, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shards_of_all_ranks_are_every_row_once_in_order(total, size):
    shards = [RowShard.of(total, rank, size) for rank in range(size)]
    assert [row for s in shards for row in range(s.start, s.stop)] == list(range(total))
    more = total % size
    assert [s.rows for s in shards] == [total // size + 1] * more + [total // size] * (size - more)


def test_one_rank_is_the_trivial_shard():
    assert RowShard.of(12) == RowShard(0, 12, 12)
    assert RowShard.of(12).slice == slice(0, 12)


def test_owns_and_local_agree_with_the_slice():
    shard = RowShard.of(10, 1, 3)  # rows 4, 5, 6
    index_B = torch.tensor([3, 4, 6, 7, 5])
    assert shard.owns(index_B).tolist() == [False, True, True, False, True]
    table = torch.arange(10) * 11
    owned = index_B[shard.owns(index_B)]
    assert torch.equal(table[shard.slice][shard.local(owned)], table[owned])


@pytest.mark.parametrize("rank, size", [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_does_not_exist_is_named(rank, size):
    with pytest.raises(ValueError, match=f"rank {rank} does not exist among {size}"):
        RowShard.of(5, rank, size)


def test_rows_outside_of_the_table_are_refused():
    with pytest.raises(ValueError, match="rows 3:9 do not lie within 0:8"):
        RowShard(3, 9, 8)
