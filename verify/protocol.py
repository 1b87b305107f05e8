"""The verification protocol: pairs of embeddings in, accuracy, threshold, TAR at FAR and ROC out. NumPy only.

The definition is the one that LFW-style results are published with (FaceNet's evaluation, kept by InsightFace and
its PyTorch port), so numbers compare with theirs:

- the distance of a pair is the squared L2 distance of its two embeddings, and a pair is accepted as "same" where
  that distance is *below* the threshold;
- thresholds are 0, 0.01, ... 3.99; folds are contiguous, the first `pairs % folds` of them one pair longer;
- each fold is evaluated with the threshold that was most accurate on all other folds (the smallest one on a tie);
- accuracy and threshold are means over folds, std is the population's; the ROC is the mean of the folds' curves, in
  which a fold without same (different) pairs counts as a rate of 0.

Shapes: N pairs, D embedding size, F folds, T thresholds, K = 2 kinds of pair (different, same).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from runtime.errors import PairError

THRESHOLDS_T = np.arange(0, 4, 0.01)
FARS = (1e-3, 1e-4)
# Unit vectors are at most 4 apart; the slack is for embeddings that were normalised in half precision.
LARGEST_DISTANCE = 4.01
# Rows whose float64 difference (512 wide) stays in the second-level cache: 2.5 times as fast as all rows at once.
ROWS_AT_ONCE = 128


class Fold(NamedTuple):
    """One held-out fold: its accuracy, and the threshold that the other folds chose for it."""

    accuracy: float
    threshold: float


class Roc(NamedTuple):
    """False and true positive rate at each threshold, [T] each; both rise with the threshold."""

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray


@dataclass(frozen=True)
class PairResult:
    """What a set of pairs says about a model.

    `tar_at_far` holds None for a rate that the set is too small to speak about; `why_not` says why, by rate.
    `caution` is empty, or says why accuracy, threshold and ROC mean nothing.
    """

    accuracy: float
    std: float
    threshold: float
    tar_at_far: dict[float, float | None]
    why_not: dict[float, str]
    roc: Roc
    folds: tuple[Fold, ...]
    pairs: int
    same: int
    caution: str = ""


def pair_distances(embeddings_2ND: np.ndarray) -> np.ndarray:
    """Squared L2 distance of rows 2i and 2i+1, float64 [N].

    Raises PairError for an odd number of rows, for values that are not finite and for rows that are not unit length.
    """
    if embeddings_2ND.ndim != 2:
        raise PairError(f"embeddings have shape {embeddings_2ND.shape}: expected [2 * pairs, embedding size]")
    if len(embeddings_2ND) % 2:
        raise PairError(f"{len(embeddings_2ND)} embeddings: pairs need an even number, rows 2i and 2i+1 being pair i")
    distance_N = np.empty(len(embeddings_2ND) // 2)
    for start in range(0, len(distance_N), ROWS_AT_ONCE):
        rows = embeddings_2ND[2 * start : 2 * (start + ROWS_AT_ONCE)].astype(np.float64)
        difference = rows[0::2] - rows[1::2]
        np.square(difference, out=difference)
        distance_N[start : start + ROWS_AT_ONCE] = difference.sum(axis=1)

    if not np.isfinite(distance_N).all():
        row = int(np.flatnonzero(~np.isfinite(embeddings_2ND).all(axis=1))[0])
        raise PairError(f"the embedding of image {row} (pair {row // 2}) is not finite: the model's output is broken")
    if distance_N.max(initial=0.0) > LARGEST_DISTANCE:
        pair = int(distance_N.argmax())
        raise PairError(
            f"pair {pair} is {distance_N[pair]:.4g} apart, unit vectors are at most 4 apart: normalise the embeddings"
        )
    return distance_N


def evaluate_pairs(embeddings_2ND, issame_N, folds: int = 10) -> PairResult:
    """Evaluate pairs of unit embeddings: row 2i and row 2i+1 are pair i, which shows one person where `issame_N[i]`.

    A set with pairs of one kind only has numbers that say nothing, and a `caution` that says so.
    Raises PairError for lengths that do not fit, fewer pairs than folds, and what `pair_distances` refuses.
    """
    distance_N = pair_distances(np.asarray(embeddings_2ND))
    same_N = _as_bools(issame_N)
    if len(distance_N) != len(same_N):
        raise PairError(f"{2 * len(distance_N)} embeddings are not two for each of {len(same_N)} pairs")
    if folds < 2:
        raise PairError(f"{folds} folds: at least 2 are needed, one to evaluate and one to choose its threshold")
    if len(same_N) < folds:
        raise PairError(f"{len(same_N)} pairs cannot fill {folds} folds: use a larger set or fewer folds")
    accepted_FKT, total_FK = _count_accepted(distance_N, same_N, folds)
    false_FT, true_FT = accepted_FKT[:, 0], accepted_FKT[:, 1]
    different_F1, same_F1 = total_FK[:, :1], total_FK[:, 1:]

    right_FT = true_FT + different_F1 - false_FT
    # what the other folds got right, as whole numbers: no rounding can turn a tie
    right_elsewhere_FT = right_FT.sum(axis=0) - right_FT
    best_F = right_elsewhere_FT.argmax(axis=1)
    accuracy_F = right_FT[np.arange(folds), best_F] / total_FK.sum(axis=1)
    threshold_F = THRESHOLDS_T[best_F]

    tar_at_far, why_not = _tar_at_far(distance_N[same_N], distance_N[~same_N])
    return PairResult(
        accuracy=float(accuracy_F.mean()),
        std=float(accuracy_F.std()),
        threshold=float(threshold_F.mean()),
        tar_at_far=tar_at_far,
        why_not=why_not,
        roc=Roc(
            fpr=(false_FT / np.maximum(different_F1, 1)).mean(axis=0),
            tpr=(true_FT / np.maximum(same_F1, 1)).mean(axis=0),
            thresholds=THRESHOLDS_T.copy(),
        ),
        folds=tuple(Fold(float(a), float(t)) for a, t in zip(accuracy_F, threshold_F)),
        pairs=len(same_N),
        same=int(same_N.sum()),
        caution=_one_kind(same_N),
    )


def _one_kind(same_N) -> str:
    if same_N.any() and not same_N.all():
        return ""
    kind = "one person" if same_N.all() else "two people"
    return (
        f"all {len(same_N)} pairs show {kind}: accuracy, threshold and ROC cannot be evaluated and mean nothing; "
        "pairs of both kinds are needed"
    )


def _as_bools(issame_N) -> np.ndarray:
    try:
        same_N = np.asarray(issame_N)
    except ValueError:  # lists of different lengths
        raise PairError("issame is no list of bools: expected one a pair") from None
    if same_N.ndim != 1:
        raise PairError(f"issame has shape {same_N.shape}: expected one bool a pair")
    if same_N.dtype != bool and not np.isin(same_N, (0, 1)).all():
        raise PairError("issame holds values other than true and false")
    return same_N.astype(bool)


def _count_accepted(distance_N, same_N, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """How many pairs of each fold and kind each threshold accepts [F, K, T], and how many there are [F, K].

    One histogram over (fold, kind, interval between thresholds) and its running sum replace folds * thresholds passes.
    """
    length_F = np.full(folds, len(same_N) // folds)
    length_F[: len(same_N) % folds] += 1
    fold_N = np.repeat(np.arange(folds), length_F)
    # threshold t accepts d where d < t; so d is accepted from the first threshold that is greater than it
    first_N = np.searchsorted(THRESHOLDS_T, distance_N, side="right")
    intervals = len(THRESHOLDS_T) + 1
    cell_N = (fold_N * 2 + same_N) * intervals + first_N
    count_FKT = np.bincount(cell_N, minlength=folds * 2 * intervals).reshape(folds, 2, intervals)
    return count_FKT.cumsum(axis=2)[:, :, :-1], count_FKT.sum(axis=2)


def _tar_at_far(distance_same, distance_different) -> tuple[dict, dict]:
    """Over all pairs together: the share of same pairs accepted by the largest threshold that accepts no more than
    `far` of the different ones. Any real threshold counts, so nothing is interpolated."""
    tar_at_far: dict[float, float | None] = {}
    why_not: dict[float, str] = {}
    for far in FARS:
        tar_at_far[far] = None
        # the slack keeps 0.001 * 3000 at 3 whatever its rounding
        allowed = int(far * len(distance_different) + 1e-9)
        if not len(distance_same) or not len(distance_different):
            why_not[far] = "needs same and different pairs, the set has one kind only"
        elif allowed < 1:
            needed = round(1 / far)
            why_not[far] = f"needs {needed} different pairs, the set has {len(distance_different)}"
        else:
            # fewer than `allowed` + 1 different pairs lie below the one at that place
            threshold = np.partition(distance_different, allowed)[allowed]
            tar_at_far[far] = float((distance_same < threshold).mean())
    return tar_at_far, why_not
