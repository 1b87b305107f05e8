"""Verification spread over ranks: every pair counted once, the same embeddings on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import run_ranks
from workers_verify import embedded, verified_while_training

from runtime.dist import ALONE

pytestmark = pytest.mark.core

# 46 images: batches of 4, 4, ... 2; on 8 ranks with batches of 16 some ranks have none.
CASES = [(46, 4, False), (46, 4, True), (46, 16, False)]


@pytest.fixture(scope="module")
def alone():
    return {case: embedded(ALONE, *case) for case in CASES}


@pytest.mark.parametrize("size, case", [(2, CASES[0]), (3, CASES[1]), (8, CASES[0]), (8, CASES[2])])
def test_any_number_of_ranks_gives_what_one_rank_gives(alone, size, case):
    expected, accuracy, _ = alone[case]
    answers = run_ranks(embedded, size, *case)
    for emb, rank_accuracy, _ in answers:
        assert emb.dtype == np.float32 and emb.shape == expected.shape
        assert np.abs(emb - expected).max() <= 1e-6
        assert rank_accuracy == accuracy
    asked = [row for _, _, rows in answers for row in rows]
    assert asked == list(range(case[0]))  # each image once, in the order of ranks


def test_a_wrapped_model_needs_no_equal_number_of_batches():
    (accuracies, training), *others = run_ranks(verified_while_training, 3)
    assert all(answer == (accuracies, training) for answer in others)
    assert training
