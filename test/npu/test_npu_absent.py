"""torch_npu is installed and CANN is not: every command says so in one line, also where torch loads plug-ins itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_set import make_tiny_set

pytestmark = pytest.mark.npu

WITHOUT_CANN = Path(__file__).with_name("stubs_without_cann")


@pytest.fixture
def without_cann(root, tmp_path):
    make_tiny_set(tmp_path / "set", classes=2, shots=1)

    def run(*command, **environment):
        env = {
            **environment,
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(WITHOUT_CANN), str(root)]),
            "PYTHON": sys.executable,
        }
        del env["TORCH_DEVICE_BACKEND_AUTOLOAD"]  # a user has not set it
        return subprocess.run(
            [str(part) for part in command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
        )

    return run


def test_torch_s_own_words_for_it_are_a_traceback(without_cann):
    done = without_cann(sys.executable, "-c", "import torch")
    assert done.returncode == 1 and "Traceback" in done.stderr  # else the tests below prove nothing


@pytest.mark.parametrize(
    "command",
    [
        (sys.executable, "-m", "runtime.device", "npu"),
        (sys.executable, "{root}/train.py", "--device_type=npu", "--data_mode=synthetic"),
        (sys.executable, "{root}/evaluate.py", "--device_type=npu", "--pth_path=none.pth", "--data_path={set}"),
        ("bash", "{root}/test/train_full_1p.sh", "--device_type=npu", "--data_mode=synthetic"),
        ("bash", "{root}/test/train_full_8p.sh", "--device_type=npu", "--data_mode=synthetic"),
        ("bash", "{root}/test/train_eval_8p.sh", "--device_type=npu", "--pth_path=none.pth", "--data_path={set}"),
    ],
    ids=["device", "train", "evaluate", "train_full_1p", "train_full_8p", "train_eval_8p"],
)
def test_one_line_says_it(without_cann, root, tmp_path, command):
    done = without_cann(*[part.format(root=root, set=tmp_path / "set") for part in command])
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: no npu here: torch_npu is installed but does not load (libhccl.so")
    assert "install CANN" in lines[0]


@pytest.mark.parametrize("command", ["runtime.device", "train"])
def test_also_where_the_import_ends_the_process_with_status_0(without_cann, root, command):
    if command == "train":
        command = (f"{root}/train.py", "--device_type=npu", "--data_mode=synthetic")
    else:
        command = ("-m", "runtime.device", "npu")
    done = without_cann(sys.executable, *command, TORCH_NPU_STUB="exits")
    assert done.returncode == 1 and done.stdout == "", done.stdout
    assert done.stderr.startswith(
        "error: no npu here: torch_npu is installed but does not load (ImportError: libhccl.so: cannot open"
    )
    assert len(done.stderr.splitlines()) == 1 and "install CANN" in done.stderr


def test_auto_takes_the_next_best(without_cann):
    done = without_cann(sys.executable, "-m", "runtime.device", "auto")
    assert done.stdout in ("cpu\n", "cuda\n") and done.returncode == 0, done.stderr


def test_the_report_of_the_machine_names_it(without_cann):
    done = without_cann(sys.executable, "-m", "runtime.device")
    assert "npu: not here: torch_npu is installed but does not load (libhccl.so" in done.stdout, done.stderr
