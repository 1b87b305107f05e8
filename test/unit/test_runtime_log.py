"""Commands that fail in one line, and metrics as JSON lines."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from runtime import log
from runtime.dist import ALONE
from runtime.errors import LINE_LENGTH, UserError
from runtime.log import RunLog, run_command, setup_logging

pytestmark = pytest.mark.core


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def command_that(action):
    with pytest.raises(SystemExit) as ended:
        run_command(action)
    return ended.value.code


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("kind", [UserError, *UserError.__subclasses__()])
def test_what_a_user_causes_is_one_line_and_status_1(kind, capsys):
    assert command_that(raising(kind("lfw.bin: cut off\n  after 3 images\n"))) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: lfw.bin: cut off after 3 images\n" and captured.out == ""


def test_a_path_that_cannot_be_opened_is_one_line(tmp_path, capsys):
    assert command_that(lambda: open(tmp_path / "absent")) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/absent: No such file or directory\n"


def test_a_hostile_message_is_cut_and_cannot_write_to_the_terminal(capsys):
    assert command_that(raising(UserError("label \x1b[2Jx\u202e" + "9" * 5000))) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: label \ufffd[2Jx\ufffd999") and len(line) == len("error: ") + LINE_LENGTH + 1


def test_a_cut_message_keeps_its_place_and_its_cure():
    text = str(UserError("a.txt line 1: '" + "9\n" * 4_000_000 + "': write the index again"))
    assert len(text) == LINE_LENGTH and text.isprintable()
    assert text.startswith("a.txt line 1: '9 9") and text.endswith("9 ': write the index again")


def test_an_error_without_words_shows_its_class(capsys):
    assert command_that(raising(UserError())) == 1
    assert capsys.readouterr().err == "error: UserError\n"


@pytest.mark.parametrize("bug", [ZeroDivisionError(), ValueError("x"), KeyError("x")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        run_command(raising(bug))


@pytest.mark.parametrize("returned, status", [(None, 0), (0, 0), (3, 3)])
def test_the_status_is_what_main_returns(returned, status):
    assert command_that(lambda: returned) == status


def test_ctrl_c_ends_as_in_a_shell(capsys):
    assert command_that(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_command_does_not_import_torch_by_itself(root):
    """So that it can first keep a recent torch from loading a torch_npu without CANN."""
    code = "import sys, runtime.log; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_records_are_json_lines_whatever_they_were(tmp_path):
    with RunLog(tmp_path / "run", ALONE, {"lr": 0.1}, tensorboard=False) as log:
        log.record(
            "step",
            step=3,
            loss=torch.tensor(2.5),
            accuracy=np.float32(0.25),
            lr=float("nan"),
            roc={"fpr": np.array([0.0, 1.0])},
            where=tmp_path,
            scale=torch.tensor([1, 2]),
        )
        # flushed: a reader beside the run sees it already
        (step,) = lines(tmp_path / "run")
    assert step.pop("time") > 1.6e9
    assert step == {
        "kind": "step",
        "step": 3,
        "loss": 2.5,
        "accuracy": 0.25,
        "lr": None,
        "roc": {"fpr": [0.0, 1.0]},
        "where": str(tmp_path),
        "scale": [1, 2],
    }


def test_the_run_line_says_what_ran(tmp_path):
    with RunLog(tmp_path, replace(ALONE, size=4), {"lr": 0.1, "milestones": [1, 2]}, tensorboard=False) as log:
        log.record("run", case="c", batch_size=8)
    (run,) = lines(tmp_path)
    assert run["world_size"] == 4 and run["config"] == {"lr": 0.1, "milestones": [1, 2]} and run["case"] == "c"
    assert run["versions"]["torch"] == torch.__version__ and "commit" in run


def test_only_rank_0_writes_and_only_it_fetches_values(tmp_path):
    class Fetched:
        def tolist(self):
            raise AssertionError("a rank that writes nothing waited for the device")

    with RunLog(tmp_path / "run", replace(ALONE, rank=1, size=2), {}, tensorboard=False) as log:
        log.record("step", loss=Fetched())
        log.scalar("loss", 1.0, 1)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_continues_its_file_after_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    with RunLog(tmp_path, ALONE, {}, tensorboard=False) as log:
        log.record("step", step=2)
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert text[:2] == ['{"kind": "step", "step": 1}', '{"kind": "st'] and json.loads(text[2])["step"] == 2


def test_scalars_and_figures_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    figures = pytest.importorskip("matplotlib.figure")
    with RunLog(tmp_path, ALONE, {}) as log:
        log.scalar("train_loss", torch.tensor(1.5), 1)
        log.figure("roc", lambda: figures.Figure(figsize=(1, 1)), 1)
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"train_loss" in events and b"roc" in events


def test_a_figure_is_drawn_only_for_a_board(tmp_path):
    with RunLog(tmp_path, ALONE, {}, tensorboard=False) as log:
        log.figure("roc", raising(AssertionError("drawn")), 1)


def test_tensorboard_is_done_without_where_it_is_absent(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with caplog.at_level(logging.INFO), RunLog(tmp_path, ALONE, {}) as log:
        log.scalar("loss", 1.0, 1)
        log.record("step", step=1)
    assert len(lines(tmp_path)) == 1
    assert "tensorboardX is not installed" in caplog.text


@pytest.mark.parametrize(
    "rank, size, said",
    [(0, 1, "news\ntrouble\n"), (0, 2, "[rank 0] news\n[rank 0] trouble\n"), (1, 2, "[rank 1] trouble\n")],
)
def test_log_lines_name_their_rank_and_other_ranks_only_warn(root, rank, size, said):
    code = (
        f"from runtime.log import setup_logging; import logging; setup_logging({rank}, {size});"
        "logging.getLogger('x').info('news'); logging.getLogger('x').warning('trouble')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stderr == said


def test_setting_up_twice_does_not_double_lines(root):
    assert setup_logging.__doc__
    code = "from runtime.log import setup_logging as s; import logging; s(); s(); logging.warning('once')"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stderr == "once\n"


@pytest.mark.parametrize(
    "command, said, policy",
    [("train", {}, "PASSIVE"), ("train", {"OMP_WAIT_POLICY": "active"}, "ACTIVE")],
)
def test_threads_of_a_command_sleep_while_they_wait_unless_the_user_says_otherwise(root, command, said, policy):
    """Plainly started, as no launcher has set anything. OpenMP's library reads its settings when torch brings it."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, f"{command}.py", "--device_type=cpu", "--data_path=/missing", "--pth_path=/missing"],
        cwd=root, capture_output=True, text=True, timeout=300, env={**environment, "OMP_DISPLAY_ENV": "true", **said},
    )  # fmt: skip
    if "OPENMP DISPLAY ENVIRONMENT" not in done.stderr:
        pytest.skip("this torch brings no OpenMP that tells its settings")
    assert done.returncode == 1 and f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


BEFORE_TORCH = """
import os, runpy, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise InterruptedError(os.environ.get("OMP_WAIT_POLICY"))

def ours():
    files = {name: str(getattr(module, "__file__", "")) for name, module in sys.modules.items()}
    return [name for name, file in files.items() if file.startswith(root) and "site-packages" not in file]

root = os.getcwd()
sys.path.insert(0, root)
sys.meta_path.insert(0, NoTorch())
others, sys.argv = sys.argv[1:], ["command", "--help"]
for name in others:
    os.environ.pop("OMP_WAIT_POLICY", None)
    for module in ours():
        del sys.modules[module]
    out, sys.stdout = sys.stdout, open(os.devnull, "w")
    try:
        runpy.run_module(name, run_name="__main__")
    except InterruptedError as torch:
        out.write(f"{name} {torch}\\n")
    except SystemExit:
        pass  # --help needed no torch
    sys.stdout = out
"""


def test_every_command_has_told_threads_to_sleep_before_it_imports_torch(root):
    """torch's import is stopped, and tells the setting: the library reads it then."""
    commands = [
        path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
        for folder in ("", "benchmark", "checkpoint", "data", "deploy", "head", "plsc", "runtime", "scripts", "tools")
        for path in sorted((root / folder).glob("*.py"))
        if "__main__" in path.read_text(encoding="utf-8") and path.stem != "worker"
    ]
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_TORCH, *commands], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(line.split() for line in done.stdout.splitlines())
    assert {"head.plan", "benchmark.step", "runtime.device"} <= set(said) and set(said.values()) == {"passive"}, said


def test_each_run_has_a_folder_of_its_own_and_a_resumed_one_goes_on(tmp_path):
    assert log.run_folder(tmp_path, resumed=True) == log.run_folder(tmp_path) == tmp_path / "log"
    RunLog(tmp_path / "log", ALONE, {}, tensorboard=False).close()
    assert log.run_folder(tmp_path) == tmp_path / "log_2"
    assert log.run_folder(tmp_path, resumed=True) == tmp_path / "log"


def test_a_full_disk_costs_lines_and_not_the_training(tmp_path, caplog):
    class Full:
        """A disk with room for some bytes."""

        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = min(self.room, len(data))
            self.room -= count
            return self.file.write(data[:count])

        def close(self):
            self.file.close()

    run_log = RunLog(tmp_path, ALONE, {}, tensorboard=False)
    disk = run_log._file = Full(run_log._file, 1000)
    run_log.record("step", step=1)
    disk.room = 10
    for step in (2, 3, 4):
        run_log.record("step", step=step)
    disk.room = 1000
    run_log.record("step", step=5)
    run_log.close()
    whole = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["step"] for line in whole] == [1, 5]
    assert caplog.text.count("lines are lost (No space left on device)") + caplog.text.count("the disk is full") == 1
