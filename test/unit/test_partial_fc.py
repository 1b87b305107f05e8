"""Partial FC: the sample (exact, uniform, seeded, O(sampled)), and what it does to the loss and to the centers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from head_tools import rows_gradient

from head import margins
from head.head import MarginHead
from head.margins import MARGINS
from head.sampler import ClassSampler

pytestmark = pytest.mark.core

NO_POSITIVES = np.array([-1])


# --- the sample -------------------------------------------------------------------------------------------------------


def chi_square_is_plausible(counts, expected, freedom):
    """Within four standard deviations of what uniform counts give, on both sides."""
    statistic = float((((counts - expected) ** 2) / expected).sum())
    return abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("rows, count", [(11, 3), (12, 4), (97, 9), (12, 9)])
def test_every_row_and_every_pair_is_sampled_alike(rows, count):
    sampler, steps = ClassSampler(rows, (count + 0.5) / rows, seed=7, first_row=0), 1500
    source = np.random.default_rng(0)
    count_R, pair_RR = torch.zeros(rows), torch.zeros(rows, rows)
    for step in range(steps):
        index_N, _ = sampler(NO_POSITIVES, step)
        assert index_N.shape[0] == count and (np.diff(index_N) > 0).all()
        count_R[index_N] += 1
        a, b = source.choice(index_N, 2, replace=False)
        pair_RR[a, b] += 1
    # sampling without replacement narrows the counts by 1 - count / rows
    assert chi_square_is_plausible(
        (count_R - steps * count / rows) / (1 - count / rows) ** 0.5 + steps * count / rows,
        steps * count / rows,
        rows - 1,
    )
    off_diagonal = pair_RR[~torch.eye(rows, dtype=torch.bool)]
    assert chi_square_is_plausible(off_diagonal, steps / (rows * (rows - 1)), rows * (rows - 1) - 1)


def test_negatives_stay_uniform_beside_positives():
    rows, steps, positives_B = 40, 1500, np.array([3, 3, 17, -1])
    sampler, count_R = ClassSampler(rows, 0.25, seed=1, first_row=0), torch.zeros(rows)
    for step in range(steps):
        count_R[sampler(positives_B, step)[0]] += 1
    assert count_R[3] == count_R[17] == steps
    negatives_N = torch.cat([count_R[:3], count_R[4:17], count_R[18:]])
    rate = 8 / 38
    assert chi_square_is_plausible((negatives_N - steps * rate) / (1 - rate) ** 0.5 + steps * rate, steps * rate, 37)


def test_all_positives_are_in_and_nothing_twice():
    source = np.random.default_rng(0)
    for step in range(300):
        rows, batch = int(source.integers(1, 60)), int(source.integers(1, 20))
        sampler = ClassSampler(rows, float(source.random()), seed=3, first_row=5)
        column_B = source.integers(-1, rows, batch)
        index_R, place_B = sampler(column_B, step)
        if index_R is None:
            assert sampler.size(batch) == rows and (place_B == column_B).all()
            continue
        assert (np.diff(index_R) > 0).all() and index_R.shape[0] == sampler.size(batch)
        assert index_R[0] >= 0 and index_R[-1] < rows
        own_B = column_B >= 0
        assert ((place_B >= 0) == own_B).all() and (index_R[place_B[own_B]] == column_B[own_B]).all()


@pytest.mark.parametrize("ahead", [1, 10**9])
def test_it_is_seeded_and_differs_between_steps_and_ranks(monkeypatch, ahead):
    """The same whether it was sampled ahead, in the thread, or when it was asked for."""
    monkeypatch.setattr(ClassSampler, "AHEAD", ahead)

    def sampled(seed=0, step=5, first_row=0, before=0):
        sampler = ClassSampler(5000, 0.1, seed, first_row)
        return [sampler(np.array([1, 2]), s)[0] for s in range(step - before, step + 1)][-1]

    assert (sampled() == sampled()).all() and (sampled() == sampled(before=2)).all()
    for other in (sampled(seed=1), sampled(step=6), sampled(first_row=5000)):
        shared = len(set(sampled().tolist()) & set(other.tolist()))
        assert 20 < shared < 85  # 50 by chance, and the two positives


def test_it_costs_what_is_sampled_not_what_there_is():
    """With ten thousand million rows anything that touches them all would not return."""
    rows = 10**10
    index_R, place_B = ClassSampler(rows, 1e-7, seed=0, first_row=0)(np.array([0, rows - 1, -1, 0]), 9)
    assert index_R.shape[0] == 1000 and int(index_R[500]) > rows // 3
    assert index_R[place_B[[0, 1, 3]]].tolist() == [0, rows - 1, 0]


# --- the loss over sampled rows ---------------------------------------------------------------------------------------


def make(num_classes=40, dim=6, **kw):
    return MarginHead(num_classes, dim, dtype=torch.float64, seed=4, **kw)


def batch(num_classes=40, dim=6, size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    emb_BD = torch.randn(size, dim, generator=generator, dtype=torch.float64) * 3
    return emb_BD.requires_grad_(), torch.randint(num_classes, (size,), generator=generator)


def sampled(head, label_B, step):
    return [torch.from_numpy(t) for t in head.sampler(label_B.numpy(), step)]


@pytest.mark.parametrize("op", ["reference", "chunked"])
@pytest.mark.parametrize("margin", sorted(MARGINS))
@pytest.mark.parametrize("threshold", [0.0, 0.25])
def test_every_margin_over_the_sampled_rows(op, margin, threshold):
    if margin == "linear_softmax" and threshold:
        return
    head = make(margin=margin, op=op, sample_rate=0.3, interclass_filtering_threshold=threshold)
    before_CW = head.centers.weight.clone()
    emb_BD, label_B = batch()
    index_R, place_B = sampled(head, label_B, 0)
    out = head(emb_BD, label_B)
    out.loss.backward()

    # the same with autograd over the chosen rows, from the table before the step
    leaf_BD, leaf_RW = emb_BD.detach().clone().requires_grad_(), before_CW[index_R].requires_grad_()
    if margin == "linear_softmax":
        cos_BR = torch.cat([leaf_BD, torch.ones(5, 1, dtype=torch.float64)], 1) @ leaf_RW.t()
        s = 1.0
    else:
        cos_BR, s = F.linear(F.normalize(leaf_BD), F.normalize(leaf_RW)), 64.0
    target_B = cos_BR.gather(1, place_B[:, None])[:, 0]
    arguments = [target_B.detach()]
    if margin == "adaface":
        arguments.append(margins.NormStatistics().quality(emb_BD.norm(dim=1)))
    value_B, derivative_B = MARGINS[margin].function(*arguments)
    value_B = value_B + derivative_B * (target_B - target_B.detach())
    if threshold:
        cos_BR = torch.where(cos_BR > threshold, torch.zeros_like(cos_BR), cos_BR)
    loss = F.cross_entropy(s * cos_BR.scatter(1, place_B[:, None], value_B[:, None]), place_B)
    loss.backward()
    assert float(out.loss) == pytest.approx(float(loss), abs=1e-12)
    assert (emb_BD.grad - leaf_BD.grad).abs().max() < 1e-12
    ((sample, kept),) = head._pending
    grad_RW = rows_gradient(head.op, kept, head.centers.rows(index_R), head.spec)
    assert torch.equal(sample.index_R, index_R) and (grad_RW - leaf_RW.grad).abs().max() < 1e-12

    head.step(0.1)
    moved_C = (head.centers.weight != before_CW).any(1)
    assert torch.equal(torch.sort(index_R)[0], torch.nonzero(moved_C)[:, 0])


def test_only_sampled_rows_move_and_their_momentum():
    head = make(sample_rate=0.25, momentum=0.9, weight_decay=0.1)
    head.centers.momentum.data.fill_(0.5)
    emb_BD, label_B = batch()
    index_R = sampled(head, label_B, 0)[0]
    weight_CW, momentum_CW = head.centers.weight.clone(), head.centers.momentum.data.clone()
    head(emb_BD, label_B).loss.backward()
    grad_RW = rows_gradient(head.op, head._pending[0][1], head.centers.rows(index_R), head.spec)
    head.step(0.2)
    new_momentum_RW = 0.9 * 0.5 + grad_RW + 0.1 * weight_CW[index_R]
    expected_momentum_CW = momentum_CW.index_copy(0, index_R, new_momentum_RW)
    expected_weight_CW = weight_CW.index_add(0, index_R, -0.2 * new_momentum_RW)
    assert torch.allclose(head.centers.momentum.data, expected_momentum_CW, rtol=0, atol=1e-14)
    assert torch.allclose(head.centers.weight, expected_weight_CW, rtol=0, atol=1e-14)
    untouched = torch.ones(40, dtype=torch.bool)
    untouched[index_R] = False
    assert torch.equal(head.centers.weight[untouched], weight_CW[untouched])
    assert torch.equal(head.centers.momentum.data[untouched], momentum_CW[untouched])


def test_update_rows_all_is_a_dense_optimizer_on_an_indexed_parameter():
    """What arcface_torch does: it indexes a dense parameter, so momentum and decay reach every row."""
    head = make(sample_rate=0.25, update_rows="all", weight_decay=0.05)
    dense_CW = torch.nn.Parameter(head.centers.weight.clone())
    optimizer = torch.optim.SGD([dense_CW], lr=0.1, momentum=0.9, weight_decay=0.05)
    for step in range(4):
        emb_BD, label_B = batch(seed=step)
        index_R, place_B = sampled(head, label_B, step)
        head(emb_BD, label_B).loss.backward()
        head.step(0.1)
        optimizer.zero_grad()
        cos_BR = F.linear(F.normalize(emb_BD.detach()), F.normalize(dense_CW[index_R]))
        target_B = cos_BR.gather(1, place_B[:, None])[:, 0]
        value_B, derivative_B = margins.arcface(target_B.detach())
        value_B = value_B + derivative_B * (target_B - target_B.detach())
        F.cross_entropy(64 * cos_BR.scatter(1, place_B[:, None], value_B[:, None]), place_B).backward()
        optimizer.step()
        assert (head.centers.weight - dense_CW).abs().max() < 1e-12


def test_gradients_of_several_samples_add_up():
    together, apart = make(sample_rate=0.25, momentum=0.0, weight_decay=0.0), make(sample_rate=0.25)
    start_CW = together.centers.weight.clone()
    total_CW = torch.zeros_like(start_CW)
    for seed in range(3):
        emb_BD, label_B = batch(seed=seed)
        together(emb_BD, label_B).loss.backward()
        apart(emb_BD, label_B).loss.backward()
        sample, kept = apart._pending.pop()
        grad_RW = rows_gradient(apart.op, kept, apart.centers.rows(sample.index_R), apart.spec)
        total_CW.index_add_(0, sample.index_R, grad_RW)
    together.step(0.1)
    assert (together.centers.weight - (start_CW - 0.1 * total_CW)).abs().max() < 1e-14


def test_the_sample_resumes_and_eval_takes_all():
    first, second = make(sample_rate=0.3), make(sample_rate=0.3)
    for seed in range(4):
        if seed == 2:
            second.load_local_state(first.local_state())
        emb_BD, label_B = batch(seed=seed)
        first(emb_BD, label_B).loss.backward()
        first.step(0.1)
        if seed >= 2:
            second(emb_BD, label_B).loss.backward()
            second.step(0.1)
    assert torch.equal(first.centers.weight, second.centers.weight)
    first.eval()
    draws = first.draws
    with torch.no_grad():
        whole = make()
        whole.load_kernel(first.gathered_kernel().double())
        emb_BD, label_B = batch(seed=9)
        assert float(first(emb_BD, label_B).loss) == pytest.approx(float(whole(emb_BD, label_B).loss), rel=1e-6)
    assert first.draws == draws
