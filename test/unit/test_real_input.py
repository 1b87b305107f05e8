"""Real faces in files that other tools wrote, through the launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    "name, batch, classes, images",
    [
        ("lfw_small", 8, 260, 2579),
        ("tipc/small_dataset", 4, 10, 10),
        ("adaface_mini_rec", 4, 2, 8),
    ],
)
def test_it_trains_a_few_steps(shared, root, tmp_path, name, batch, classes, images):
    done = subprocess.run(
        [
            "bash",
            "test/train_full_1p.sh",
            f"--data_path={shared / 'real' / name}",
            f"--batch_size={batch}",
            "--net_mode=mobilefacenet",
            "--embedding_size=32",
            "--epochs=1",
            "--max_iter=2",
            "--lr=0.01",
            "--log_every=1",
            "--device_type=cpu",
            "--with_test=0",
            "--num_workers=0",
            "--tensorboard=0",
            f"--run_dir={tmp_path / 'run'}",
            f"--work_path={tmp_path / 'work'}",
        ],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stderr
    assert "Final Performance images/sec" in done.stdout and "E2E Training Duration sec" in done.stdout
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert (lines[0]["num_classes"], lines[0]["images"]) == (classes, images)
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2]
