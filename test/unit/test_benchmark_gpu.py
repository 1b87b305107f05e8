"""benchmark/gpu.sh whole, on a CPU and small: nothing trivial may break on the day that a GPU is lent."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

from benchmark import gpu


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_all_of_it_runs(root, tmp_path):
    (tmp_path / "mine").write_text("not its to remove")
    command = ["bash", "benchmark/gpu.sh", "--device=cpu", "--tiny", "--minutes=30", f"--output={tmp_path}/results"]
    done = subprocess.run(
        [*command, f"--work={tmp_path}"],
        cwd=root,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "results").glob("*_gpu.json"))
    assert list(record["parts"]) == list(gpu.PARTS)
    statuses = [command["status"] for part in record["parts"].values() for command in part]
    assert len(statuses) >= 7 and set(statuses) == {0}
    written = {path.name.split("_", 1)[1].split(".")[0] for path in (tmp_path / "results").iterdir()}
    assert {"head_cpu", "gpu"} < written and any(name.startswith("step_cpu") for name in written)
    resumed = next(command for command in record["parts"]["scale"] if "--resume" in command["command"])
    assert any("epoch 1 step 2/2" in line for line in resumed["said"])
    assert (tmp_path / "mine").exists() and not list(tmp_path.glob("scale_*/*"))


def test_a_part_that_hangs_costs_its_own_time_only(tmp_path, monkeypatch, capsys):
    def hangs(options):
        return [[sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"], ["echo", "late"]]

    monkeypatch.setattr(gpu, "PARTS", {"step": hangs, "loader": lambda options: [["echo", "after"]]})
    start = time.monotonic()
    where = [f"--output={tmp_path}", f"--work={tmp_path}/work"]
    assert gpu.main(["--device=cpu", "--part=step,loader", "--minutes=0.05", *where]) == 1
    assert time.monotonic() - start < 100
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*_gpu.json"))
    assert [c["status"] for c in record["parts"]["step"]] == ["out of time", "no time left"]
    assert (
        gpu.main(["--device=cpu", "--part=all", *where]) == 1 and "choose from step, loader" in capsys.readouterr().err
    )
