"""Margins: value and slope against the angle's formula and autograd in float64; nothing infinite at |cos| = 1."""

from __future__ import annotations

import math

import pytest
import torch

from head import margins, register_margin
from head.head import MarginHead
from head.margins import (
    MARGINS,
    NormStatistics,
    adaface,
    arcface,
    arcface_straight_through,
    combined,
    cosface,
    find_margin,
    softmax,
)
from runtime.errors import ModelError

pytestmark = pytest.mark.core

COS = torch.cat(
    [
        torch.linspace(-0.999, 0.999, 401, dtype=torch.float64),
        torch.tensor([1 - 1e-9, -1 + 1e-9, 1 - 1e-14], dtype=torch.float64),
    ]
)


def arcface_formula(c, m):
    angle = torch.acos(c)
    return torch.where(angle < math.pi - m, torch.cos(angle + m), c - m * math.sin(m))


def combined_formula(c, m1, m2, m3):
    angle = torch.acos(c)
    end = (math.pi - m2) / m1
    beyond = c - math.cos(end) - math.cos(m2) - m2 * math.sin(m2)
    return torch.where(angle < end, torch.cos(m1 * angle + m2), beyond) - m3


QUALITY = torch.linspace(-1, 1, COS.shape[0], dtype=torch.float64)


def adaface_formula(c, m):
    turned = (torch.acos(c) - m * QUALITY).clamp(0, math.pi)
    return torch.cos(turned) - m * (1 + QUALITY)


CASES = {
    "softmax": (softmax, lambda c: c),
    "cosface 0.35": (lambda c: cosface(c, 0.35), lambda c: c - 0.35),
    "arcface 0.5": (lambda c: arcface(c, 0.5), lambda c: arcface_formula(c, 0.5)),
    "arcface 0": (lambda c: arcface(c, 0.0), lambda c: c * 1.0),
    "arcface 1.2": (lambda c: arcface(c, 1.2), lambda c: arcface_formula(c, 1.2)),
    "combined 1 .3 .2": (lambda c: combined(c, 1.0, 0.3, 0.2), lambda c: combined_formula(c, 1.0, 0.3, 0.2)),
    "combined 1.35 0 0": (lambda c: combined(c, 1.35, 0.0, 0.0), lambda c: combined_formula(c, 1.35, 0.0, 0.0)),
    "combined .9 .4 .15": (lambda c: combined(c, 0.9, 0.4, 0.15), lambda c: combined_formula(c, 0.9, 0.4, 0.15)),
    "adaface 0.4": (lambda c: adaface(c, QUALITY, 0.4), lambda c: adaface_formula(c, 0.4)),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_slope_are_the_formulas(name):
    margin, formula = CASES[name]
    value_B, slope_B = margin(COS)
    leaf_B = COS.clone().requires_grad_()
    expected_B = formula(leaf_B)
    (expected_slope_B,) = torch.autograd.grad(expected_B.sum(), leaf_B)
    # Close to |cos| = 1 the formula's own acos keeps half the digits of 1 - |cos|.
    condition_B = 1 / (1 - COS.abs()).sqrt()
    assert ((value_B - expected_B).abs() <= 1e-14 * condition_B).all()
    error_B = (slope_B - expected_slope_B).abs()
    assert (error_B <= 1e-14 * condition_B * (1 + expected_slope_B.abs()) * condition_B).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(MARGINS))
def test_finite_at_and_beyond_one(name, dtype):
    eps = torch.finfo(dtype).eps
    cos_B = torch.tensor([1.0, -1.0, 1 - eps / 2, -1 + eps / 2, 1 + 4 * eps, -1 - 4 * eps, 0.0], dtype=dtype)
    margin = find_margin(name)
    arguments = [torch.zeros_like(cos_B)] if margin.reads_norms else []
    value_B, slope_B = margin.function(cos_B, *arguments)
    assert torch.isfinite(value_B).all() and torch.isfinite(slope_B).all()
    assert value_B.dtype == slope_B.dtype == dtype


@pytest.mark.parametrize("m", [0.2, 0.5, 0.8])
def test_arcface_is_a_case_of_combined(m):
    for mine, theirs in zip(arcface(COS[:401], m), combined(COS[:401], 1.0, m, 0.0)):
        assert (mine - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("m1, m2, m3", [(1.0, 0.5, 0.0), (1.35, 0.0, 0.0), (1.1, 0.3, 0.1), (4.0, 0.0, 0.0)])
def test_a_better_cosine_is_never_worth_less(m1, m2, m3):
    value_B, slope_B = combined(COS[:401], m1, m2, m3)
    assert (value_B[1:] >= value_B[:-1]).all() and (slope_B >= 0).all()


def test_straight_through_keeps_the_value_and_drops_the_slope_and_the_branch():
    value_B, slope_B = arcface_straight_through(COS[:401], 0.5)
    assert (value_B - torch.cos(torch.acos(COS[:401]) + 0.5)).abs().max() < 1e-14
    assert (slope_B == 1).all()
    assert (arcface(COS[:401], 0.5)[1] != 1).any()


def test_adaface_moves_from_angle_to_cosine_with_quality():
    cos_B = torch.tensor([0.3], dtype=torch.float64)
    low = adaface(cos_B, torch.tensor([-1.0], dtype=torch.float64), 0.4)[0]
    middle = adaface(cos_B, torch.tensor([0.0], dtype=torch.float64), 0.4)[0]
    assert float(low) == pytest.approx(float(arcface(cos_B, 0.4)[0]), abs=1e-15)
    assert float(middle) == pytest.approx(0.3 - 0.4, abs=1e-15)


def test_norm_statistics_run_and_survive_a_damaged_batch():
    statistics = NormStatistics(h=0.333, alpha=0.9)
    first_B, second_B = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([40.0, 50.0, 300.0])
    quality_B = statistics.quality(first_B)
    spread = first_B.std(unbiased=False)
    assert torch.allclose(quality_B, (0.333 * (first_B - 20) / (spread + 1e-3)), atol=1e-6)
    statistics.quality(second_B)
    clipped_B = second_B.clamp(max=100)
    mean = 20 + 0.9 * (clipped_B.mean() - 20)
    assert float(statistics.mean_spread[0]) == pytest.approx(float(mean), rel=1e-6)
    kept = statistics.state()
    statistics.quality(torch.tensor([1.0, float("nan"), 3.0]))
    assert torch.equal(statistics.state(), kept)
    statistics.quality(first_B, update=False)
    assert torch.equal(statistics.state(), kept)
    again = NormStatistics(h=0.333, alpha=0.9)
    again.load(kept)
    assert torch.equal(again.quality(first_B), statistics.quality(first_B))
    assert (statistics.quality(torch.tensor([0.0, 90.0, 90.0])).abs() <= 1).all()


def test_an_unknown_margin_names_the_choices():
    with pytest.raises(ModelError, match="margin 'arcfase': choose from arcface,.*linear_softmax"):
        find_margin("arcfase")


# --- a margin of one's own -------------------------------------------------------------------------------------------


@pytest.fixture
def own_margins(monkeypatch):
    monkeypatch.setattr(margins, "MARGINS", dict(margins.MARGINS))


def test_a_margin_of_ones_own_is_one_function(own_margins):
    """The derivative is autograd's; cosface written again trains as the one that is here."""

    @register_margin("mine")
    def mine(cos_B, m=0.4):
        return cos_B - m

    @register_margin("steep")
    def steep(cos_B):
        return cos_B, 3 * torch.ones_like(cos_B)

    @register_margin("by_length", reads_norms=True)
    def by_length(cos_B, quality_B, m=0.1):
        return cos_B - m * quality_B

    cos_B = torch.tensor([-1.0, -0.3, 0.2, 1.0], dtype=torch.float64)
    value_B, derivative_B = margins.find_margin("mine").function(cos_B, m=0.1)
    assert torch.equal(value_B, cos_B - 0.1) and (derivative_B == 1).all() and not value_B.requires_grad
    assert (margins.find_margin("steep").function(cos_B)[1] == 3).all()
    emb_BD = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    weights = []
    for name in ("mine", "cosface", "by_length"):
        head = MarginHead(9, 4, margin=name, m=0.2, seed=1)
        for _ in range(3):
            head(emb_BD.clone().requires_grad_(), torch.tensor([0, 3, 8, 8, 1])).loss.backward()
            head.step(0.1)
        weights.append(head.centers.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    with pytest.raises(ModelError, match="loss_type 'cosface': there is one of this name already"):
        register_margin("cosface")(mine)
    assert mine(cos_B).shape == (4,)  # the decorated stays what it was


def test_a_nan_in_the_first_batch_does_not_stay_in_the_statistics():
    norms = margins.NormStatistics()
    assert torch.isnan(norms.quality(torch.tensor([1.0, float("nan"), 3.0]))).all()
    after = norms.quality(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.isfinite(after).all() and torch.equal(
        after, margins.NormStatistics().quality(torch.tensor([1.0, 2.0, 3.0]))
    )
    saved = margins.NormStatistics()
    saved.load(torch.tensor([float("nan"), 2.0]))  # as an older version saved it
    saved.quality(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.isfinite(saved.state()).all()
