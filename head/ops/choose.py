"""Which implementation a head takes: the one asked for, or the quickest that agrees with the others."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from head.ops import Rows, candidates, find_op
from runtime.dist import ALONE

TRIAL_ROWS = 2**18  # of the table, at most
REPEATS = 3
TOLERANCE = 0.02  # of the largest element: half operands, summed in another order


def choose_op(name: str, device: torch.device, rows: Rows, spec, world, batch: int | None) -> tuple:
    """(HeadOp, {name: what its trial saw}). "auto" times both passes of every candidate on these rows and a batch of
    random embeddings (batch: of one rank), and takes the quickest whose results agree with the first's; without a
    choice, or without batch, the first one and no trial. All ranks take the same.

    Raises ModelError for a name that does not exist or that cannot run there.
    """
    if name != "auto":
        return find_op(name, device), {}
    ops = candidates(device)
    if len(ops) < 2 or not batch:
        return ops[0], {}
    if rows.count > TRIAL_ROWS:
        if rows.index_R is None:
            rows = Rows(*(None if t is None else t[:TRIAL_ROWS] for t in rows))
        else:
            rows = rows._replace(index_R=rows.index_R[:TRIAL_ROWS])
    spec = replace(spec, margin=lambda target_B, norm_B: (target_B, torch.ones_like(target_B)))  # without statistics
    images = batch * world.size
    emb_BD = torch.randn(images, rows.weight_CW.shape[1], device=device, dtype=torch.float32)
    column_B = torch.arange(images, device=device) * max(1, rows.count // images) % rows.count
    seen = {op.name: _try(op, emb_BD, rows, column_B, spec) for op in ops}
    first = seen[ops[0].name].get("results")
    for trial in seen.values():
        results = trial.pop("results", None)
        if results is not None and first is not None:
            trial["difference"] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, first))
    everyone = world.all_gather_object(seen)
    agreed = {op.name: max(_cost(of_rank[op.name]) for of_rank in everyone) for op in ops}
    return min(ops, key=lambda op: agreed[op.name]), seen


def _cost(trial) -> float:
    return trial.get("seconds", float("inf")) if trial.get("difference", 0.0) <= TOLERANCE else float("inf")


def _try(op, emb_BD, rows, column_B, spec) -> dict:
    """{"seconds", "results"} or {"left_out": why}."""
    api = None if emb_BD.device.type == "cpu" else getattr(torch, emb_BD.device.type)
    best = float("inf")
    try:
        with torch.no_grad():
            for _ in range(1 + REPEATS):
                if api:
                    api.synchronize(emb_BD.device)
                start = time.perf_counter()
                grads = []
                passed = op.first(emb_BD, rows, column_B, spec, ALONE, True)
                passed.kept.grad_B = torch.full_like(passed.loss_B, 1 / len(emb_BD))

                def sink(start, stop, grad_KW, scale_K=None, along_K=None, weight_KW=None, grads=grads):
                    if not grads:
                        grads.append(grad_KW * (1 if scale_K is None else scale_K[:, None]))

                op.second(passed.kept, rows, spec, sink)
                if api:
                    api.synchronize(emb_BD.device)
                best = min(best, time.perf_counter() - start)
    except Exception as error:  # a candidate that does not run here is left out, and the record says why
        return {"left_out": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return {"seconds": best, "results": (passed.loss_B, passed.grad_BD, grads[0])}
