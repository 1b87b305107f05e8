"""Two ranks: an overflow on one skips the step on both, and they give up together."""

from __future__ import annotations

import pytest
import workers_precision
from ranks import run_ranks

from runtime.device import Device

pytestmark = pytest.mark.core
KINDS = ["sgd_plain", *(["sgd_fused"] if "sgd_fused" in Device("cpu").fused_optimizers() else [])]
CASES = [(name, kind, where) for name, where in (("O0", "head"), ("O2", "backbone"), ("O2", "head")) for kind in KINDS]


@pytest.fixture(scope="module")
def reports():
    return run_ranks(workers_precision.two_ranks, 2, CASES)


@pytest.mark.parametrize("case", CASES)
def test_an_overflow_on_one_rank_skips_the_step_on_every_rank(reports, case):
    on_0, on_1 = (report["native"][case] for report in reports)
    kept, lowered = (1024.0, 512.0) if case[0] == "O2" else (1.0, 1.0)
    assert on_0 == on_1 == [(False, kept, 0), (False, kept, 0), (True, lowered, 1), (False, lowered, 1)]


def test_under_apex_too_and_the_scales_stay_together(reports):
    on_0, on_1 = (report["apex"] for report in reports)
    assert on_0 == on_1 == [(False, 2.0**16, 0), (False, 2.0**16, 0), (True, 2.0**15, 1), (False, 2.0**15, 1)]


def test_a_stuck_training_names_module_and_rank_on_every_rank(reports):
    on_0, on_1 = (report["stuck"] for report in reports)
    assert on_0 == on_1
    text, seed, unchanged = on_0
    assert "first not finite: the loss on rank 1" in text and seed == 2 and unchanged
