"""What the plan says of a step's collectives is what the ranks call: their kinds, their order and their bytes."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from benchmark import scaling
from head.plan import HeadPlan
from runtime.dist import ALONE

pytestmark = pytest.mark.core

CASES = {
    "all rows": dict(classes=203, batch=6, embedding_size=12),
    "sampled": dict(classes=503, batch=4, embedding_size=12, sample_rate=0.2, form="bf16 + int8"),
    "momentum on the host": dict(classes=203, batch=5, embedding_size=7, form="bf16 + host bf16"),
}
# AdaFace's norms are those of the gathered embeddings: no further word
MARGINS = {"all rows": "arcface", "sampled": "adaface", "momentum on the host": "cosface"}


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_collectives_are_those_of_the_plan(ranks):
    calls = {name: (case, MARGINS[name]) for name, case in CASES.items()}
    for found in run_ranks(scaling.count_several, ranks, calls):
        for name, case in CASES.items():
            assert found[name] == scaling.expected(case, ranks), name


def test_the_bytes_by_hand():
    """Two ranks of 6 images, 12 numbers each: 12 images together."""
    assert scaling.expected(CASES["all rows"], 2) == [
        ("all_gather", 12 * 8),
        ("all_gather", 12 * 12 * 4),
        ("all_reduce", 12 * 4),
        ("all_reduce", 12 * 2 * 4),
        ("all_reduce", 12 * 2 * 4),
        ("all_reduce", 12 * 12 * 4),
    ]
    plan = scaling.plan_of(CASES["all rows"], 2)
    # half of what is gathered; what is reduced everywhere travels twice, by halves
    assert plan.network_traffic == (96 + 576) / 2 + (48 + 96 + 96 + 576)


def test_one_rank_sends_nothing():
    assert scaling.count(ALONE, CASES["all rows"]) == [] == list(scaling.plan_of(CASES["all rows"], 1).collectives)


def test_the_counter_counts(monkeypatch):
    """A collective that is made of others is one, and a reduce_scatter counts what it reduces."""
    monkeypatch.setattr(scaling.dist, "all_reduce", lambda t: t)
    monkeypatch.setattr(scaling.dist, "all_gather", lambda parts, t: scaling.dist.all_reduce(t))
    monkeypatch.setattr(scaling.dist, "reduce_scatter_tensor", lambda out, t: out, raising=False)
    with scaling.counted() as calls:
        scaling.dist.all_gather([torch.zeros(3), torch.zeros(3)], torch.zeros(3))
        scaling.dist.reduce_scatter_tensor(torch.zeros(2), torch.zeros(4))
        scaling.dist.all_reduce(torch.zeros(5, dtype=torch.int64))
    scaling.dist.all_reduce(torch.zeros(5))
    assert calls == [("all_gather", 24), ("reduce_scatter", 16), ("all_reduce", 40)]


def test_the_simulation_by_hand():
    plan = HeadPlan(10**6, world_size=8, sample_rate=0.1, device_type="cuda")
    machine = scaling.Machine(latency=1e-3)
    step = scaling.simulate(plan, machine, parameters=1e6, element_bytes=4)
    assert step.head == max(plan.operations / 790e12, plan.device_traffic / 4.3e12)
    # 3 all_reduces of 2 x log2 8 stages, 3 other collectives of 3
    assert step.head_network == pytest.approx(plan.network_traffic / 50e9 + (3 * 6 + 3 * 3) * 1e-3)
    assert step.backbone_network == pytest.approx(2 * 7 / 8 * 4e6 / 50e9 + 6e-3)
    ring = scaling.simulate(plan, scaling.Machine(latency=1e-3, ring=True), parameters=1e6, element_bytes=4)
    assert ring.head_network == pytest.approx(plan.network_traffic / 50e9 + (3 * 14 + 3 * 7) * 1e-3)
    alone = scaling.simulate(HeadPlan(10**6), machine)
    assert alone.head_network == alone.backbone_network == 0


def test_the_fewest_devices_hold_it():
    plan = HeadPlan(10**8, sample_rate=0.1)
    devices = scaling.fewest_devices(plan, 10**8, 123 * 2**30, 2**30)
    assert devices == 4  # 381 GiB of state: 95 on each, and with two 191 would be too much
    assert scaling.fewest_devices(plan, 10**9, 2**30, 0, most=64) is None
