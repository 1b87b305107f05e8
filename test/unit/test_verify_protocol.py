"""The verification protocol against a straightforward version of its definition, by-hand examples, and bad input."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from benchmark.protocol import evaluate_pairs_plainly, make_pairs
from runtime.errors import PairError
from verify.protocol import evaluate_pairs

pytestmark = pytest.mark.core

AT = {0: (1.0, 0.0), 2: (0.0, 1.0), 4: (-1.0, 0.0)}  # a unit vector at that squared distance from (1, 0)


def pairs_at(*distances):
    """Embeddings [2N, 2] of pairs whose squared distances are exactly these, each 0, 2 or 4."""
    return np.array([row for distance in distances for row in ((1.0, 0.0), AT[distance])], np.float32)


def circle_pairs(rng, count, low, high):
    angle = rng.uniform(low, high, count)
    rows = np.stack([np.stack([np.ones(count), np.zeros(count)], 1), np.stack([np.cos(angle), np.sin(angle)], 1)], 1)
    return rows.reshape(2 * count, 2)


@pytest.mark.parametrize("pairs, folds, seed", [(6000, 10, 0), (23, 10, 1), (100, 7, 2), (10, 10, 3), (300, 2, 4)])
def test_same_numbers_as_the_straightforward_version(pairs, folds, seed):
    embeddings, issame = make_pairs(pairs, 512 if pairs == 6000 else 16, seed)
    if seed == 2:
        issame = np.sort(issame)  # folds of one kind only, and distances that do not tell
    if seed == 4:
        embeddings = np.repeat(embeddings[:20], 30, axis=0)  # a few distances, many ties
        assert len(embeddings) == 2 * pairs
    result = evaluate_pairs(embeddings, issame, folds)
    accuracy, threshold, fpr, tpr = evaluate_pairs_plainly(embeddings, issame, folds)
    np.testing.assert_array_equal([fold.accuracy for fold in result.folds], accuracy)
    np.testing.assert_array_equal([fold.threshold for fold in result.folds], threshold)
    np.testing.assert_array_equal(result.roc.fpr, fpr)
    np.testing.assert_array_equal(result.roc.tpr, tpr)
    assert (result.accuracy, result.std, result.threshold) == (accuracy.mean(), accuracy.std(), threshold.mean())
    assert (result.pairs, result.same) == (pairs, issame.sum())


def test_a_pair_is_accepted_below_the_threshold_and_ties_take_the_smallest():
    # Fold 0 is evaluated with what fold 1 chose: 0.01 is the first threshold that accepts 0 and rejects 2; it rejects
    # fold 0's same pair. Fold 1 is evaluated with the first threshold above 2; it accepts fold 1's different pair.
    result = evaluate_pairs(pairs_at(2, 4, 0, 2), [True, False, True, False], folds=2)
    assert [fold.accuracy for fold in result.folds] == [0.5, 0.5]
    assert [fold.threshold for fold in result.folds] == pytest.approx([0.01, 2.01], abs=1e-12)
    assert (result.accuracy, result.std) == (0.5, 0.0)
    assert result.threshold == pytest.approx(1.01, abs=1e-12)


def test_folds_are_contiguous_and_the_first_ones_longer():
    # three pairs in two folds: the first two pairs, then the last. Fold 1's threshold comes from pairs 0 and 1.
    result = evaluate_pairs(pairs_at(0, 4, 2), [True, False, True], folds=2)
    assert [fold.accuracy for fold in result.folds] == [1.0, 0.0]
    assert [fold.threshold for fold in result.folds] == pytest.approx([2.01, 0.01], abs=1e-12)


def test_roc_rises_from_nothing_to_almost_everything():
    result = evaluate_pairs(*make_pairs(500, 16))
    assert result.roc.thresholds.tolist() == np.arange(0, 4, 0.01).tolist()
    assert result.roc.fpr[0] == result.roc.tpr[0] == 0
    assert result.roc.fpr[-1] > 0.99 and result.roc.tpr[-1] == 1
    assert (np.diff(result.roc.fpr) >= 0).all() and (np.diff(result.roc.tpr) >= 0).all()


def test_tar_at_far_is_the_best_that_any_threshold_reaches():
    rng = np.random.default_rng(5)
    same, different = circle_pairs(rng, 400, 0, 1.5), circle_pairs(rng, 10000, 0.9, 3)
    result = evaluate_pairs(np.concatenate([same, different]), [True] * 400 + [False] * 10000)
    d_same, d_different = (np.square(rows[0::2] - rows[1::2]).sum(1) for rows in (same, different))
    for far in (1e-3, 1e-4):
        candidates = [t for t in np.concatenate([d_same, d_different]) if (d_different < t).mean() <= far]
        assert result.tar_at_far[far] == max((d_same < t).mean() for t in candidates)
    assert result.tar_at_far[1e-4] < result.tar_at_far[1e-3] < 1
    assert result.why_not == {}


def test_tar_at_far_needs_enough_different_pairs():
    embeddings = pairs_at(*[0] * 1000, *[4] * 999)
    issame = [True] * 1000 + [False] * 999
    result = evaluate_pairs(embeddings, issame)
    assert result.tar_at_far == {1e-3: None, 1e-4: None}
    assert result.why_not[1e-3] == "needs 1000 different pairs, the set has 999"
    result = evaluate_pairs(np.concatenate([embeddings, pairs_at(4)]), [*issame, False])
    assert result.tar_at_far == {1e-3: 1.0, 1e-4: None}
    assert list(result.why_not) == [1e-4]


@pytest.mark.parametrize("same", [True, False])
def test_a_set_of_one_kind_says_that_it_cannot_be_evaluated(same):
    kind = "one person" if same else "two people"
    result = evaluate_pairs(pairs_at(*[0, 2] * 5), [same] * 10)
    assert result.caution.startswith(f"all 10 pairs show {kind}: accuracy, threshold and ROC cannot be evaluated")
    assert result.tar_at_far == {1e-3: None, 1e-4: None} and "one kind only" in result.why_not[1e-3]
    assert evaluate_pairs(pairs_at(*[0, 2] * 5), [same] * 9 + [not same]).caution == ""


def test_half_precision_rows_are_unit_enough_and_the_input_stays():
    embeddings, issame = make_pairs(50, 64)
    half = np.concatenate([embeddings, [[1.0] + [0.0] * 63, [-1.0] + [0.0] * 63]]).astype(np.float16)
    before = half.copy()
    assert 0 <= evaluate_pairs(half, [*issame, False]).accuracy <= 1
    assert np.array_equal(half, before)


def broken(value):
    embeddings = pairs_at(*[0] * 20)
    embeddings[7, 1] = value
    return embeddings


@pytest.mark.parametrize("embeddings, issame, folds, words", [
    (pairs_at(*[0] * 10)[:-1], [True] * 10, 10, "19 embeddings: pairs need an even number"),
    (pairs_at(*[0] * 10), [True] * 11, 10, "20 embeddings are not two for each of 11 pairs"),
    (pairs_at(*[0] * 9), [True] * 9, 10, "9 pairs cannot fill 10 folds"),
    (np.zeros((0, 2)), [], 10, "0 pairs cannot fill 10 folds"),
    (pairs_at(*[0] * 10), [True] * 10, 1, "1 folds"),
    (broken(np.nan), [True] * 20, 10, r"image 7 \(pair 3\) is not finite"),
    (broken(np.inf), [True] * 20, 10, r"image 7 \(pair 3\) is not finite"),
    (broken(9), [True] * 20, 10, "pair 3 is 81 apart, .*: normalise"),
    (np.zeros(20), [True] * 10, 10, "expected"),
    (pairs_at(*[0] * 10), np.ones((10, 1)), 10, "one bool a pair"),
    (pairs_at(*[0] * 10), [True] * 9 + [[True, False]], 10, "one a pair|other than true"),
    (pairs_at(*[0] * 10), [0, 1] * 4 + [2, 3], 10, "other than true and false"),
    (pairs_at(*[0] * 10), [True] * 9 + [float("nan")], 10, "other than true and false"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(embeddings, issame, folds, words):
    with pytest.raises(PairError, match=words) as error:
        evaluate_pairs(embeddings, issame, folds)
    assert "\n" not in str(error.value)


def test_numpy_is_all_it_needs(root):
    code = "import sys, verify.protocol; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
