"""The harness finds what it is for, and findings of the past stay mended. `run_tests.sh` runs 2,000 cases a target."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
if "run" not in sys.modules or getattr(sys.modules["run"], "__file__", "") != str(HERE / "run.py"):
    sys.path.insert(0, str(HERE))
    spec = importlib.util.spec_from_file_location("run", HERE / "run.py")
    sys.modules["run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["run"])
import run  # noqa: E402
from mutations import Sample  # noqa: E402

TARGETS = run.load_targets()
KEPT = sorted(run.FINDINGS.glob("*/*.json"))


@pytest.mark.parametrize("path", KEPT, ids=[f"{path.parent.name}-{path.stem}" for path in KEPT])
def test_what_was_found_stays_mended(path):
    outcome = run.replay(path)
    assert not outcome.is_finding, outcome


def test_bombs_and_breaks(monkeypatch):
    """What the harness is for, planted: each must be found, and the cases after it must still run."""
    monkeypatch.setattr(run, "CPU_SECONDS", 1)
    monkeypatch.setattr(run, "WAIT_SECONDS", 1)
    monkeypatch.setattr(run, "MEMORY_BYTES", 128 << 20)

    def sleep():
        time.sleep(1000)

    def spin():
        while True:
            pass

    planted = {
        "time": [sleep, spin],
        "crash": [lambda: ctypes.string_at(0)],
        "memory": [lambda: bytes(8 << 30), lambda: len(b"x" * (150 << 20))],
        "exception": [lambda: 1 // 0, lambda: sys.exit(3)],
        "touched": [
            lambda: open("../secret.jpg"),
            lambda: open(Path(__file__).parent / "new_file", "w"),
            lambda: os.remove(__file__),
            lambda: subprocess.run(["true"]),
            lambda: run.logging.getLogger("reader").warning("the file says \x1b[2J"),
        ],
    }
    faults = [(kind, fault) for kind, faults in planted.items() for fault in faults]

    def read(folder):
        number = int((folder / "number").read_text())
        if number < len(faults):
            faults[number][1]()

    target = run.Target("planted", read, lambda: [], lambda: None, 1.0)
    outcomes = run.outcomes(target, lambda i: Sample({"number": b"%d" % i}), range(len(faults) + 1))
    kinds = [outcomes[i].kind for i in range(len(faults) + 1)]
    assert kinds == [kind for kind, _fault in faults] + ["valid"], outcomes


def test_a_sample_comes_back_from_its_file():
    for one in run.prepared(TARGETS["image_list"]):
        assert Sample.from_json(one.to_json()) == one


def test_a_broken_reader_fails_the_run(monkeypatch, tmp_path, capsys):
    """From the command line to the exit status, through the processes in between: nothing is lost on the way."""

    def broken(folder):
        assert (folder / "a").read_bytes()[:4] == b"head"

    monkeypatch.setattr(run, "TARGETS", {"broken": run.Target("broken", broken, lambda: [{"a": b"header"}], list, 1.0)})
    monkeypatch.setattr(run, "load_targets", lambda: run.TARGETS)
    monkeypatch.setattr(run, "FINDINGS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "all", "--cases=50"])
    assert run.main() == 1
    assert "exception AssertionError" in capsys.readouterr().out
    kept = list(tmp_path.glob("broken/exception_*.json"))
    assert kept and run.replay(kept[0]).is_finding
