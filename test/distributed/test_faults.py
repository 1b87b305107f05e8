"""Faults put into running trainings (scripts/fault_rounds.py), one of each quick kind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint import sharded


@pytest.mark.timeout(1000)
@pytest.mark.skipif(not shutil.which("cc"), reason="faults.c needs a C compiler")
@pytest.mark.skipif(not sharded.available(), reason="half of the rounds save sharded checkpoints")
def test_after_each_fault_the_newest_whole_checkpoint_resumes_to_the_same_losses():
    kinds = ["kill", "write", "logs", "worker"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.fault_rounds", *kinds, "--rounds=1", "--first=1"],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if "passed" in line] == [f"{k}: 1 rounds passed" for k in kinds]
