"""The verification protocol beside a straightforward version of the same definition, in one run.

    python -m benchmark.protocol [--pairs 6000] [--embedding_size 512] [--repeats 5] [--record NAME]

`evaluate_pairs_plainly` is also the specification: the tests hold `verify.protocol` to its numbers.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from benchmark.record import write_record
from runtime.device import Device
from verify.protocol import THRESHOLDS_T, evaluate_pairs


def evaluate_pairs_plainly(embeddings_2ND, issame_N, folds: int = 10):
    """The definition, step by step: every fold, every threshold, every pair.

    Returns (accuracy_F, threshold_F, fpr_T, tpr_T).
    """
    distance_N = np.sum(np.square(embeddings_2ND[0::2].astype(float) - embeddings_2ND[1::2]), axis=1)
    issame_N = np.asarray(issame_N)
    held_out_folds = np.array_split(np.arange(len(issame_N)), folds)
    accuracy_F, threshold_F, fpr_FT, tpr_FT = [], [], [], []
    for held_out in held_out_folds:
        others = np.setdiff1d(np.arange(len(issame_N)), held_out)
        accuracy_T = [_rates(t, distance_N[others], issame_N[others])[2] for t in THRESHOLDS_T]
        best = THRESHOLDS_T[np.argmax(accuracy_T)]
        rates_T3 = [_rates(t, distance_N[held_out], issame_N[held_out]) for t in THRESHOLDS_T]
        fpr_FT.append([fpr for fpr, _, _ in rates_T3])
        tpr_FT.append([tpr for _, tpr, _ in rates_T3])
        accuracy_F.append(_rates(best, distance_N[held_out], issame_N[held_out])[2])
        threshold_F.append(best)
    return np.array(accuracy_F), np.array(threshold_F), np.mean(fpr_FT, axis=0), np.mean(tpr_FT, axis=0)


def _rates(threshold, distance_N, issame_N):
    accepted_N = distance_N < threshold
    same, different = issame_N.sum(), (~issame_N).sum()
    true_accepts, false_accepts = (accepted_N & issame_N).sum(), (accepted_N & ~issame_N).sum()
    fpr = false_accepts / different if different else 0.0
    tpr = true_accepts / same if same else 0.0
    return fpr, tpr, (true_accepts + different - false_accepts) / len(issame_N)


def make_pairs(pairs: int, embedding_size: int, seed: int = 0):
    """Unit embeddings [2N, D] whose same pairs lie closer than the others, with overlap, and their labels [N]."""
    rng = np.random.default_rng(seed)
    issame_N = rng.random(pairs) < 0.5
    embeddings_2ND = rng.standard_normal((2 * pairs, embedding_size), dtype=np.float32)
    pull_N1 = np.where(issame_N, rng.normal(0.5, 0.2, pairs), 0.0)[:, None].astype(np.float32)
    embeddings_2ND[1::2] += pull_N1 * embeddings_2ND[0::2]
    return embeddings_2ND / np.linalg.norm(embeddings_2ND, axis=1, keepdims=True), issame_N


def best_seconds(call, repeats: int) -> float:
    """The fastest of `repeats` calls: what the code costs when nothing else runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--embedding_size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", help="write benchmark/results/DATE_{this name}.json")
    options = parser.parse_args(argv)
    embeddings_2ND, issame_N = make_pairs(options.pairs, options.embedding_size)

    result = evaluate_pairs(embeddings_2ND, issame_N)
    accuracy_F, threshold_F, fpr_T, tpr_T = evaluate_pairs_plainly(embeddings_2ND, issame_N)
    same_numbers = (
        result.accuracy == accuracy_F.mean()
        and result.threshold == threshold_F.mean()
        and np.array_equal(result.roc.fpr, fpr_T)
        and np.array_equal(result.roc.tpr, tpr_T)
    )
    fast = best_seconds(lambda: evaluate_pairs(embeddings_2ND, issame_N), options.repeats)
    plain = best_seconds(lambda: evaluate_pairs_plainly(embeddings_2ND, issame_N), options.repeats)
    row = {
        "pairs": options.pairs,
        "embedding_size": options.embedding_size,
        "seconds": round(fast, 5),
        "seconds_straightforward": round(plain, 5),
        "times_faster": round(plain / fast, 1),
        "same_numbers": bool(same_numbers),
        "accuracy": result.accuracy,
    }
    print(json.dumps(row))
    if options.record:
        print(write_record(options.record, row, Device("cpu")))


if __name__ == "__main__":
    main()
