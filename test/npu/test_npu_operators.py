"""docs/npu_operators.md names every operator that training calls on the NPU."""

from __future__ import annotations

import operators
import pytest

pytestmark = pytest.mark.npu


def test_the_kept_list_is_whole():
    import npu_sim

    kept = operators.kept()
    listed = kept.get(operators.section())
    if listed is None:  # a newer torch: what any version called
        listed = {
            name: set().union(*(part.get(name, set()) for part in kept.values()))
            for part in kept.values()
            for name in part
        }
    measured = operators.measure()
    assert len(measured) > 40
    assert not npu_sim.slow({name: dtypes for name, (dtypes, _) in measured.items()})
    missing = {name: dtypes - {"-"} - listed.get(name, set()) for name, (dtypes, _) in measured.items()}
    missing = {name: dtypes for name, dtypes in missing.items() if dtypes or name not in listed}
    assert not missing, "not in docs/npu_operators.md: run `python test/npu/operators.py --write`"
