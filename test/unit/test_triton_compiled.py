"""Every Triton kernel compiles for the GPUs that it may meet, without one, and does not spill."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_the_record_is_of_these_kernels_and_names_no_spill(root):
    """Variants and tiles at the default width; `python -m benchmark.kernels` makes it anew."""
    from runtime import files

    record = json.loads(sorted((root / "benchmark" / "results").glob("*_kernels.json"))[-1].read_text())
    assert record["kernels"] == files.file_checksum(root / "head" / "ops" / "triton_kernels.py"), (
        "run benchmark.kernels"
    )
    rows = record["rows"]
    assert {row["sm"] for row in rows} == {80, 90, 100} and len({row["kernel"] for row in rows}) == 4
    for row in rows:
        assert row["spills"] == 0 and row["registers"] <= 255 and row["WIDTH"] == 512
        assert row["shared"] <= (166912 if row["sm"] == 80 else 232448)
    for sm in (80, 90, 100):  # something is left to try everywhere
        tiles = {(row["BLOCK_B"], row["BLOCK_K"]) for row in rows if row["sm"] == sm and "BLOCK_B" in row}
        assert len(tiles) >= 2


@pytest.mark.slow
def test_kernels_compile_without_a_gpu(root):
    """Some variants of each, narrow, here and now; and the update once for all of its random keys. In a process of its
    own, where Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmark.kernels", "--width=64", "--sample=2", "--output="],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == [
        "programs of the update's kernel for all of its random keys: 1",
        "24 kernels, 0 bad",
    ]
