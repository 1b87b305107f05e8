"""The head on several ranks is the head on one: losses, counts, gradients, updates, checkpoints."""

from __future__ import annotations

import pytest
import torch
import workers_head
from ranks import run_ranks

from head.head import MarginHead
from runtime.dist import ALONE, World
from runtime.errors import ModelError

pytestmark = pytest.mark.core


def same(ranks, alone, tolerance=1e-12):
    for rank in ranks:
        for (loss, *counts), (loss_1, *counts_1) in zip(rank["history"], alone["history"]):
            assert loss == pytest.approx(loss_1, rel=tolerance, abs=tolerance)
            assert counts == counts_1
        assert (rank["net"] - alone["net"]).abs().max() < tolerance
    main = ranks[0]
    assert all(rank["kernel"] is None and rank["momentum"] is None for rank in ranks[1:])
    for name in ("kernel", "momentum", "bias", "norms"):
        if alone[name] is None:
            assert main[name] is None
        else:  # kernel and momentum travel as float32
            assert (main[name].double() - alone[name].double()).abs().max() < 1e-6
    weight_CW = torch.cat([rank["weight"] for rank in ranks]) if len(main["weight"]) < 23 else main["weight"]
    assert (weight_CW - alone["weight"]).abs().max() < tolerance


CASES = {
    "arcface": dict(margin="arcface"),
    "reference": dict(margin="arcface", op="reference"),
    "adaface": dict(margin="adaface"),
    "softmax with bias": dict(margin="linear_softmax"),
    "filtered": dict(margin="cosface", interclass_filtering_threshold=0.2),
    "accumulated": dict(margin="arcface", accumulate=2),
}
REPLICATED = ["arcface", "linear_softmax", "adaface"]
# 23 classes do not divide by 3, and some ranks have no positive at all.
LABELS = {
    "one class": [0] * 12,
    "first rank only": [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0],
    "last class": [22] * 12,
    "everywhere": None,
}


@pytest.fixture(scope="module")
def checkpoint():
    return workers_head.train_and_save(ALONE)


@pytest.fixture(scope="module")
def two(checkpoint):
    """What two ranks do, all in one world: {name: [rank 0's result, rank 1's]}."""
    calls = {name: (workers_head.train, (), case) for name, case in CASES.items()}
    calls.update({f"replicated {m}": (workers_head.train, (), dict(margin=m, sharded=False)) for m in REPLICATED})
    calls["bad batch"] = (workers_head.bad_batch, (), {})
    calls.update(
        samples=(workers_head.samples, (), {}),
        save=(workers_head.train_and_save, (), {}),
        reload=(workers_head.reload, checkpoint, {}),
    )
    return by_name(run_ranks(workers_head.several, 2, calls))


@pytest.fixture(scope="module")
def three(checkpoint):
    calls = {name: (workers_head.train, (), dict(labels=labels, steps=2)) for name, labels in LABELS.items()}
    calls["reload"] = (workers_head.reload, checkpoint, {})
    return by_name(run_ranks(workers_head.several, 3, calls))


def by_name(ranks):
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one(two, name):
    same(two[name], workers_head.train(ALONE, **CASES[name]))


@pytest.mark.parametrize("name", LABELS)
def test_three_ranks_whatever_they_own(three, name):
    same(three[name], workers_head.train(ALONE, labels=LABELS[name], steps=2))


@pytest.mark.parametrize("margin", REPLICATED)
def test_replicated_centers_are_averaged(two, margin):
    ranks = two[f"replicated {margin}"]
    assert torch.equal(ranks[0]["weight"], ranks[1]["weight"]) and ranks[0]["rows"] == (0, 23)
    same(ranks, workers_head.train(ALONE, margin=margin))


def test_samples_differ_between_ranks_and_hold_their_positives(two):
    (first, index_0, place_0), (second, index_1, place_1) = two["samples"]
    assert (first, second) == (0, 2000) and len(index_0) == len(index_1) == 200
    assert len(set(index_0) & set(index_1)) < 60  # 20 by chance
    # the global batch is 5, 5, 3999, 7
    assert [index_0[p] if p >= 0 else None for p in place_0] == [5, 5, None, 7]
    assert [index_1[p] if p >= 0 else None for p in place_1] == [None, None, 1999, None]


def test_a_bad_batch_on_one_rank_moves_no_rank(two):
    (found_0, still_0, _), (found_1, still_1, finite_1) = two["bad batch"]
    assert still_0 and still_1 and not finite_1 and found_0 == found_1 == 1.0


def test_a_checkpoint_goes_to_any_number_of_ranks(two, three, checkpoint):
    alone_DC = workers_head.reload(ALONE, *checkpoint)
    kernel_DC, state = two["save"][0]
    assert (kernel_DC - checkpoint[0]).abs().max() < 1e-6
    assert (state["momentum"] - checkpoint[1]["momentum"]).abs().max() < 1e-6
    for ranks in (two["reload"], three["reload"]):
        assert (ranks[0] - alone_DC).abs().max() < 1e-6


def test_what_cannot_be_shared():
    world = World(rank=0, size=4)
    with pytest.raises(ModelError, match="num_classes 3: needs at least 2, and as many as ranks share them \\(4\\)"):
        MarginHead(3, 8, world=world)
    with pytest.raises(ModelError, match="sample_rate below 1 needs sharded centers"):
        MarginHead(8, 8, world=world, sharded=False, sample_rate=0.5)
