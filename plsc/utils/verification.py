"""PLSC's evaluate: the same protocol as verify.protocol's, with the values in PLSC's order."""

from __future__ import annotations

import numpy as np

from verify.protocol import evaluate_pairs, pair_distances


def evaluate(embeddings, actual_issame, nrof_folds: int = 10, pca: int = 0):
    """(tpr, fpr, accuracy [folds], val, val_std, far): val is the share of same pairs accepted at FAR 1e-3, by folds'
    own thresholds. embeddings: unit rows [2N, D]. Raises PairError."""
    result = evaluate_pairs(embeddings, actual_issame, nrof_folds)
    accuracy = np.array([fold.accuracy for fold in result.folds])
    distance_N, same_N = pair_distances(np.asarray(embeddings)), np.asarray(actual_issame, bool)
    thresholds = np.arange(0, 4, 0.001)
    edges = np.linspace(0, len(same_N), nrof_folds + 1).astype(int)
    vals, fars = [], []
    for start, stop in zip(edges, edges[1:]):
        test = np.zeros(len(same_N), bool)
        test[start:stop] = True
        apart = np.sort(distance_N[~test & ~same_N])
        allowed = np.searchsorted(apart, thresholds) <= 1e-3 * max(1, len(apart))
        threshold = thresholds[allowed][-1] if allowed.any() else 0.0
        accepted = distance_N < threshold
        vals.append(accepted[test & same_N].mean() if (test & same_N).any() else 0.0)
        fars.append(accepted[test & ~same_N].mean() if (test & ~same_N).any() else 0.0)
    return result.roc.tpr, result.roc.fpr, accuracy, float(np.mean(vals)), float(np.std(vals)), float(np.mean(fars))
