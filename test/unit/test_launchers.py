"""The launchers: what they start, with which options, and how they end. Programs are stand-ins that say what they got;
test/common.sh, config.py and runtime/ are the project's own."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from config import replace
from configs import RECIPES

pytestmark = pytest.mark.core
LAUNCHERS = (
    "train_full_1p",
    "train_full_8p",
    "train_performance_1p",
    "train_performance_8p",
    "train_finetune_1p",
    "train_eval_8p",
)

PROGRAM = """
import json, os, signal, sys, time
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
         "TORCH_DEVICE_BACKEND_AUTOLOAD", "CANN_WAS_HERE")
if "--help" in sys.argv:
    print("help of", os.path.basename(sys.argv[0]))
    sys.exit()
got = {"argv": sys.argv, "cwd": os.getcwd(), **{name: os.environ.get(name) for name in NAMES}}
rank = int(got["RANK"] or 0)
folder = [a.split("=", 1)[1] for a in sys.argv if a.startswith("--run_dir=")][-1]
json.dump(got, open(f"{folder}/got_{rank}.json", "w"))
print("working", rank, flush=True)
do, _, argument = os.environ.get(f"RANK_{rank}", "").partition(" ")
if do == "exit":
    print("error: no luck", file=sys.stderr)
    sys.exit(int(argument))
if do == "exit_once" and not os.path.exists(f"{folder}/was_here"):
    open(f"{folder}/was_here", "w").close()
    sys.exit(int(argument))
if do == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if do == "wait":
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: signals.append(n))
    open(f"{folder}/ready_{rank}", "w").close()
    end = time.time() + 600
    while not signals and time.time() < end:
        time.sleep(0.05)
    time.sleep(0.3)  # a second one would arrive now
    print("signals", signals)
    sys.exit(128 + signals[0])
if rank == 0:
    print("Final Performance images/sec : 1.00")
"""
REPORT = """
import sys
print("Final Performance images/sec : 1.00", sys.argv[1:])
"""


@pytest.fixture
def project(tmp_path, root):
    """A project whose train.py, evaluate.py and report.py are the stand-ins."""
    folder = tmp_path / "project with space"
    (folder / "test").mkdir(parents=True)
    for script in (root / "test").glob("*.sh"):
        shutil.copy(script, folder / "test")
    for name in ("config.py", "configs", "runtime"):
        (folder / name).symlink_to(root / name)
    (folder / "train.py").write_text(PROGRAM)
    (folder / "evaluate.py").write_text(PROGRAM)
    (folder / "report.py").write_text(REPORT)
    return folder


class Run:
    """How a launcher ended, and what its programs got."""

    def __init__(self, project, done):
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr
        folders = sorted((project / "test" / "output").glob("*"))
        self.folder = folders[-1] if folders else None
        self.got = [json.loads(path.read_text()) for path in sorted(self.folder.glob("got_*.json"))] if folders else []

    def option(self, name, rank=0):
        """The value that counts: the last one given."""
        values = [a.split("=", 1)[1] for a in self.got[rank]["argv"] if a.startswith(f"--{name}=")]
        return values[-1] if values else None


def environment(**env):
    clean = {
        name: value
        for name, value in os.environ.items()
        if name
        not in (
            "RANK_SIZE",
            "OMP_NUM_THREADS",
            "NNODES",
            "NODE_RANK",
            "MASTER_ADDR",
            "MASTER_PORT",
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "ASCEND_HOME_PATH",
        )
    }
    return {**clean, "PYTHON": sys.executable, **{name: str(value) for name, value in env.items()}}


def launch(project, script, *arguments, cwd=None, **env):
    done = subprocess.run(
        ["bash", str(project / "test" / f"{script}.sh"), *arguments],
        cwd=cwd or project,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=900,
    )
    return Run(project, done)


def options(root, program, argv):
    """config.py's reading of what a program got, by a fresh import."""
    code = (
        "import sys, json, config; from configs import RECIPES; print(json.dumps(config.parse_arguments("
        f"sys.argv[1:], training={program == 'train.py'}, recipes=RECIPES).as_dict()))"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "script, expected",
    [
        ("train_full_1p", {"epochs": 20, "batch_size": 256, "lr": 0.001, "max_iter": -1}),
        ("train_performance_1p", {"epochs": 2, "batch_size": 256, "lr": 0.001, "max_iter": 1000}),
        ("train_finetune_1p", {"epochs": 20, "batch_size": 256, "is_finetune": True}),
    ],
)
def test_one_rank_gets_the_model_zoo_s_defaults(project, root, script, expected):
    run = launch(project, script, RANK_SIZE=8, RANK=3, WORLD_SIZE=8)  # left over from somewhere: 1p is one rank
    assert run.status == 0, run.err
    assert len(run.got) == 1 and run.got[0]["WORLD_SIZE"] is None and run.got[0]["RANK"] is None
    assert Path(run.got[0]["argv"][0]).name == "train.py"
    got = options(root, "train.py", run.got[0]["argv"][1:])
    assert {name: got[name] for name in expected} == expected
    assert (got["net_mode"], got["net_depth"], got["milestones"]) == ("ir_se", 100, [12, 15, 18])
    assert got["device_type"] == "auto" and got["opt_level"] == "auto" and got["use_amp"]
    assert "Final Performance images/sec : 1.00" in run.out and str(run.folder.relative_to(project)) in run.out
    assert run.folder.name.startswith(script)
    assert (run.folder / "rank_0.log").read_text().startswith("working 0\n") and "working 0" in run.out


def test_ranks_start_through_torch_and_share_the_cores(project, root):
    run = launch(project, "train_full_8p", "--device_type=cpu", RANK_SIZE=3)
    assert run.status == 0, run.err + (run.folder / "launcher.log").read_text()
    assert [(got["RANK"], got["LOCAL_RANK"], got["WORLD_SIZE"]) for got in run.got] == [
        ("0", "0", "3"),
        ("1", "1", "3"),
        ("2", "2", "3"),
    ]
    cores = len(os.sched_getaffinity(0))
    assert {got["OMP_NUM_THREADS"] for got in run.got} == {str(max(1, cores // 3))}
    assert {got["TORCH_DEVICE_BACKEND_AUTOLOAD"] for got in run.got} == {"0"}
    assert len({got["MASTER_PORT"] for got in run.got}) == 1
    assert {got["MASTER_ADDR"] for got in run.got} == {"127.0.0.1"}
    for rank in range(3):
        assert (run.folder / f"rank_{rank}.log").read_text().startswith(f"working {rank}\n")
    assert "working 0" in run.out and "working 1" not in run.out
    got = options(root, "train.py", run.got[0]["argv"][1:])
    assert (got["epochs"], got["batch_size"], got["lr"]) == (20, 320 * 3, 0.01)


def test_evaluation_of_one_rank(project):
    run = launch(project, "train_eval_8p", "--pth_path=model.pth", RANK_SIZE=1)
    assert run.status == 0, run.err
    assert Path(run.got[0]["argv"][0]).name == "evaluate.py"
    assert run.option("recipe") is None and run.option("batch_size") is None and run.option("data_path") is None
    assert run.option("pth_path") == "model.pth"


def test_options_of_the_user_win_in_either_spelling(project, root):
    run = launch(
        project,
        "train_performance_1p",
        "--batch-size=8",
        "--lr",
        "0.5",
        "--data_mode=synthetic",
        "--val-targets",
        "lfw",
        "cfp_fp",
        "--use_amp",
        "--milestones=1,2",
    )
    assert run.status == 0, run.err
    got = options(root, "train.py", run.got[0]["argv"][1:])
    assert (got["batch_size"], got["lr"], got["data_mode"], got["milestones"]) == (8, 0.5, "synthetic", [1, 2])
    assert got["val_targets"] == ["lfw", "cfp_fp"] and got["max_iter"] == 1000


def test_a_recipe_of_the_user_replaces_the_launcher_s(project, root):
    run = launch(project, "train_full_1p", "--recipe", "quickstart")
    got = options(root, "train.py", run.got[0]["argv"][1:])
    assert got == replace(RECIPES["quickstart"], recipe="quickstart", run_dir=got["run_dir"]).as_dict()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--batch-sise=8", "unknown option --batch-sise: did you mean --batch_size"),
        ("--batch_size=many", "--batch"),
    ],
)
def test_a_wrong_option_ends_in_one_line_before_anything_starts(project, wrong, said):
    run = launch(project, "train_full_8p", wrong)
    assert run.status == 1 and run.out == "" and run.folder is None
    assert run.err.startswith("error: ") and run.err.count("\n") == 1 and said in run.err


@pytest.mark.parametrize(
    "env, said",
    [
        ({"RANK_SIZE": "eight"}, "RANK_SIZE='eight' is not a number"),
        ({"RANK_SIZE": "08"}, "RANK_SIZE='08' is not a number such as 8"),
        ({"RANK_SIZE": "9" * 30}, "RANK_SIZE='999"),
        ({"MASTER_PORT": 0}, "MASTER_PORT=0: must be at least 1"),
        ({"MASTER_PORT": 70000}, "MASTER_PORT=70000: must be at most 65535"),
        ({"RANK_SIZE": 0}, "RANK_SIZE=0: must be at least 1"),
        ({"NNODES": 2}, "NNODES=2 needs MASTER_ADDR, the address of machine 0"),
        ({"NNODES": 2, "NODE_RANK": 2, "MASTER_ADDR": "a"}, "NODE_RANK=2 does not exist among NNODES=2 machines"),
        ({"PYTHON": "/nowhere/python"}, "no Python at '/nowhere/python'"),
    ],
)
def test_a_wrong_environment_is_one_line(project, env, said):
    run = launch(project, "train_full_8p", **env)
    assert run.status == 1 and run.out == "" and run.folder is None
    assert run.err.startswith(f"error: {said}") and run.err.count("\n") == 1


@pytest.mark.parametrize("script, device", [("train_full_8p", "gpu"), ("train_full_1p", "cuda:4000")])
def test_devices_that_are_not_there_are_one_line_before_anything_starts(project, script, device):
    run = launch(project, script, f"--device_type={device}", RANK_SIZE=4096)
    assert run.status == 1 and run.out == "" and run.folder is None
    said = "no cuda here: |4096 ranks on this machine, but |cuda:4000 does not exist: "
    assert re.fullmatch(f"error: ({said}).*\n", run.err)


@pytest.mark.parametrize("script, program", [("train_full_8p", "train.py"), ("train_eval_8p", "evaluate.py")])
def test_help_is_the_program_s(project, script, program):
    run = launch(project, script, "--help")
    assert (run.status, run.out, run.err, run.folder) == (0, f"help of {program}\n", "", None)


def test_a_failing_rank_gives_its_status_and_its_log_and_no_report(project):
    run = launch(project, "train_full_8p", "--device_type=cpu", RANK_SIZE=2, RANK_0="wait", RANK_1="exit 7")
    assert run.status == 7
    assert "rank 1 ended with status 7" in run.err and run.err.endswith("working 1\nerror: no luck\n")
    assert "Final" not in run.out and "Traceback" not in run.out + run.err


@pytest.mark.parametrize("does, status, last", [("exit 7", 7, "error: no luck"), ("die", 137, "Killed")])
def test_a_failing_single_rank_does_so_too_and_its_error_is_shown_once(project, does, status, last):
    run = launch(project, "train_full_1p", RANK_0=does)
    assert run.status == status and "Final" not in run.out
    assert run.err.splitlines() == [
        f"rank 0 ended with status {status}; its output is in {run.folder.relative_to(project)}/rank_0.log"
    ]
    assert run.out.count(last) == 1


def test_an_error_of_all_ranks_is_shown_once(project):
    run = launch(project, "train_full_8p", "--device_type=cpu", RANK_SIZE=2, RANK_0="exit 7", RANK_1="exit 7")
    assert run.status == 7 and (run.out + run.err).count("error: no luck") == 1


@pytest.mark.parametrize("shell", ["sh", "dash", "bash --posix"])
def test_any_shell_will_do(project, shell):
    """`sh test/train_full_1p.sh`, and a bash that plays sh: the launcher goes on in bash."""
    if not shutil.which(shell.split()[0]):
        pytest.skip(f"no {shell} here")
    done = subprocess.run(
        [*shell.split(), "test/train_full_1p.sh"], cwd=project, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and "Final" in done.stdout, done.stderr


def test_nothing_that_bash_3_2_lacks(root):
    """What came with bash 4 and later, or with one system only; macOS still ships 3.2."""
    newer = (
        r"BASHPID|EPOCH|mapfile|readarray|coproc|declare -A|local -n|wait -n|&>>|\|&|;&|\$\{\w+[\^,@]|\bnproc\b|\[-1\]"
    )
    scripts = [*root.glob("*.sh"), *root.glob("test/*.sh"), *root.glob("scripts/*.sh"), root / ".ci" / "run"]
    found = [
        f"{path.name}:{n}: {line}"
        for path in scripts
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(newer, line.split("  #")[0]) and not line.lstrip().startswith("#")
    ]
    assert not found, found


def test_the_bar_of_progress_finds_the_terminal_behind_the_log(project):
    """The launcher on a terminal of its own: its program's stderr is none, and yet the bar is on the terminal."""
    (project / "train.py").write_text(
        PROGRAM.replace(
            'print("working"',
            "from runtime.progress import progress\n"
            "with progress(10, 'epoch 0', 'step') as bar:\n"
            "    assert not sys.stderr.isatty() and not bar.disable\n"
            "    time.sleep(0.2)\n"
            "    bar.update(5)\n"
            'print("working"',
        )
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
    done = subprocess.run(
        ["bash", "test/train_full_1p.sh"], cwd=project, env=environment(), stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    shown = os.read(ours, 10000).decode()
    os.close(ours)
    assert done.returncode == 0, shown
    assert "epoch 0:  50%" in shown and "<" in shown  # tqdm's time left
    assert "epoch 0" not in next((project / "test" / "output").glob("*/rank_0.log")).read_text()


def test_a_rank_that_failed_once_is_no_failure_where_torchrun_may_start_again(project):
    if importlib.util.find_spec("torch.distributed.run") is None:
        pytest.skip("torch.distributed.launch starts nothing again")
    once = dict(RANK_SIZE=2, RANK_1="exit_once 7")
    run = launch(project, "train_full_8p", "--device_type=cpu", MAX_RESTARTS=1, **once)
    assert run.status == 0 and "Final" in run.out, run.err
    assert (run.folder / "rank_1.log").read_text() == "working 1\nworking 1\n"
    assert launch(project, "train_full_8p", "--device_type=cpu", **once).status == 7


@pytest.mark.parametrize("number, to_group", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_reaches_the_rank_once_and_there_is_no_report(project, number, to_group):
    """SIGTERM to the launcher alone, as from a scheduler; SIGINT to all in the foreground, as from a terminal."""
    running = subprocess.Popen(
        ["bash", "test/train_full_1p.sh"],
        cwd=project,
        env=environment(RANK_0="wait"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 600
    while not list(project.glob("test/output/*/ready_0")) and time.monotonic() < end:
        time.sleep(0.05)
    (os.killpg if to_group else os.kill)(running.pid, number)
    out, err = running.communicate(timeout=900)
    assert running.returncode == 128 + number
    assert f"signals [{number:d}]" in out and "Final" not in out
    assert f"rank 0 ended with status {128 + number}" in err


def test_called_from_anywhere_paths_are_found_where_the_caller_stands(project, tmp_path):
    (tmp_path / "here" / "faces").mkdir(parents=True)
    (tmp_path / "here" / "model.pth").touch()
    (tmp_path / "here" / "synthetic").mkdir()  # an option that is not a path stays as it is
    run = launch(
        project,
        "train_full_1p",
        "--data_path=faces",
        "--pth-path",
        "model.pth",
        "--data_mode=synthetic",
        "--resume=not_there.pth",
        cwd=tmp_path / "here",
    )
    assert run.status == 0, run.err
    argv = run.got[0]["argv"]
    assert run.got[0]["cwd"] == str(project)
    assert run.option("data_path") == str(tmp_path / "here" / "faces")
    assert argv[argv.index("--pth-path") + 1] == str(tmp_path / "here" / "model.pth")
    assert run.option("data_mode") == "synthetic" and run.option("resume") == "not_there.pth"


def test_a_folder_to_be_made_is_made_where_the_caller_stands(project, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.py").touch()
    arguments = ("--run_dir=new run", "--work-path", "models", "--plugin=mine.py")
    run = launch(project, "train_full_1p", *arguments, cwd=tmp_path / "here")
    got = next((tmp_path / "here" / "new run").glob("got_*.json"))
    argv = json.loads(got.read_text())["argv"]
    assert run.status == 0 and argv[argv.index("--work-path") + 1] == str(tmp_path / "here" / "models")
    assert f"--plugin={tmp_path / 'here' / 'mine.py'}" in argv


def test_output_is_the_folder_of_everything(project):
    for name in ("log", "log_2"):
        run = launch(project, "train_full_1p", "--output=everything")
        assert run.status == 0 and (project / "everything" / name / "rank_0.log").exists()
        (project / "everything" / name / "metrics.jsonl").touch()


def test_called_from_test_the_root_s_paths_hold(project):
    run = launch(project, "train_full_1p", "--data_path=./data/faces_emore", cwd=project / "test")
    assert run.option("data_path") == "./data/faces_emore" and run.got[0]["cwd"] == str(project)


def test_two_runs_in_one_second_do_not_share_a_folder(project):
    (project / "bin").mkdir()
    (project / "bin" / "date").write_text("#!/bin/sh\necho 20300101-000000\n")
    (project / "bin" / "date").chmod(0o755)
    for _ in range(2):
        assert launch(project, "train_full_1p", PATH=f"{project}/bin:{os.environ['PATH']}").status == 0
    assert sorted(path.name for path in (project / "test" / "output").iterdir()) == [
        "train_full_1p_20300101-000000",
        "train_full_1p_20300101-000000.2",
    ]


def test_the_user_chooses_the_run_s_folder(project):
    run = launch(project, "train_full_1p", "--run_dir=test/output/mine")
    assert run.status == 0 and run.folder.name == "mine" and (run.folder / "rank_0.log").exists()


def test_several_machines_use_the_given_address(project):
    """One of two machines: its ranks get their numbers, and only machine 0 reports."""
    (project / "torch").mkdir()  # stands in for torch, whose ranks would wait for the other machine
    for name in ("torch/__init__.py", "torch/distributed/__init__.py"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).touch()
    (project / "torch" / "distributed" / "run.py").write_text(
        "import os, subprocess, sys\n"
        "i = sys.argv.index('bash')\n"
        "print(sys.argv[1:i], file=sys.stderr)\n"
        "for r in range(2):\n"
        "    env = {**os.environ, 'RANK': str(2 + r), 'LOCAL_RANK': str(r), 'WORLD_SIZE': '4'}\n"
        "    assert subprocess.run(sys.argv[i:], env=env).returncode == 0\n"
    )
    run = launch(
        project, "train_full_8p", "--device_type=cpu", RANK_SIZE=2, NNODES=2, NODE_RANK=1, MASTER_ADDR="10.0.0.7"
    )
    assert run.status == 0, run.err
    started = (run.folder / "launcher.log").read_text()
    for argument in (
        "--nnodes=2",
        "--node_rank=1",
        "--nproc_per_node=2",
        "--master_addr=10.0.0.7",
        "--master_port=29500",
    ):
        assert f"'{argument}'" in started
    assert run.option("batch_size") == str(320 * 4)
    assert sorted(path.name for path in run.folder.glob("rank_*.log")) == ["rank_2.log", "rank_3.log"]
    assert "machine 0 has the report" in run.out


def test_the_project_s_environment_is_taken_before_the_system_s(project):
    (project / ".venv" / "bin").mkdir(parents=True)
    python = project / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexport CANN_WAS_HERE=venv\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert launch(project, "train_full_1p", PYTHON="").got[0]["CANN_WAS_HERE"] == "venv"


# --- quickstart.sh ---------------------------------------------------------------------------------------------------


@pytest.fixture
def quickstart(project, root):
    """A project in which nothing is left to install; what quickstart.sh starts says what it got."""
    shutil.copy(root / "quickstart.sh", project)
    (project / "scripts").mkdir()
    shutil.copy(root / "scripts" / "environment.sh", project / "scripts")
    (project / "requirements.txt").write_text("nothing\n")
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (project / ".venv" / "bin" / "python").chmod(0o755)
    stamp = subprocess.run(["cksum", "requirements.txt"], cwd=project, capture_output=True, text=True).stdout
    (project / ".venv" / "requirements.stamp").write_text(stamp)
    (project / "deploy").symlink_to(root / "deploy")
    (project / "data").mkdir()
    for path in (root / "data").glob("*.py"):
        (project / "data" / path.name).symlink_to(path)
    (project / "data" / "synthetic.py").unlink()
    for name in ("data/synthetic.py", "tools/contact_sheet.py"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(f"import sys\nprint({name!r}, sys.argv[1:])\n")

    def run(*arguments, cwd=project, shell="bash"):
        return subprocess.run(
            [shell, str(project / "quickstart.sh"), *arguments],
            cwd=cwd, env=environment(), capture_output=True, text=True, timeout=900,
        )  # fmt: skip

    run.project = project
    return run


def test_quickstart_makes_faces_and_runs_once(quickstart):
    done = quickstart(shell="sh")
    assert done.returncode == 0, done.stderr
    assert "data/synthetic.py ['--output', 'data/synthetic_faces', '--seed', '0']" in done.stdout
    assert "['--data_path=data/synthetic_faces', '--output=test/output/quickstart/contact_sheet.png']" in done.stdout
    argv = json.loads((quickstart.project / "test/output/quickstart/got_0.json").read_text())["argv"]
    for word in ("--recipe=quickstart", "--work_path=work_space/quickstart", "--resume=auto"):
        assert word in argv
    again = quickstart()
    assert again.returncode == 0 and "trained before with these options" in again.stdout and "Final" in again.stdout


@pytest.mark.parametrize("spelling", [["--data_path", "my faces"], ["--data-path=my faces"]])
def test_quickstart_shows_the_faces_that_it_trains_on(quickstart, tmp_path, spelling):
    """Given in either spelling, with a blank, from elsewhere, into a folder of the user's."""
    (tmp_path / "here" / "my faces").mkdir(parents=True)
    done = quickstart(*spelling, "--run_dir=out put", "--work_path=kept", cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    here = tmp_path / "here"
    assert "data/synthetic.py" not in done.stdout
    assert str([f"--data_path={here}/my faces", f"--output={here}/out put/contact_sheet.png"]) in done.stdout
    argv = json.loads((here / "out put" / "got_0.json").read_text())["argv"]
    assert f"--work_path={here}/kept" in argv and not any("work_space" in word for word in argv)
    other = quickstart(*spelling, "--run_dir=out put", "--lr=0.5", cwd=here)
    assert "trained before" not in other.stdout


def test_quickstart_ends_on_a_wrong_option_before_anything_is_made(quickstart):
    done = quickstart("--lr=much")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("error: --lr 'much': must be a number")
    assert done.stderr.count("\n") == 1 and not (quickstart.project / "test" / "output").exists()


# --- env_npu.sh ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cann(tmp_path):
    """Where a CANN is: its script reads a variable that is not set, as the real one does."""
    toolkit = tmp_path / "Ascend" / "ascend-toolkit"
    (toolkit / "latest").mkdir(parents=True)
    (toolkit / "set_env.sh").write_text("export CANN_WAS_HERE=yes:$NOT_SET_ANYWHERE\n")
    return tmp_path / "Ascend"


def env_npu(root, **env):
    code = 'set -u; source test/env_npu.sh; echo "status $?"; env; echo ${UNSET_IS_AN_ERROR_AGAIN}'
    return subprocess.run(
        ["bash", "-c", code], cwd=root, env=environment(HOME="/nowhere", **env), capture_output=True, text=True
    )


@pytest.mark.parametrize("how", ["info", "home", "home/latest"])
def test_cann_is_found(root, cann, tmp_path, how):
    (tmp_path / "info").write_text(f"Version=8.0\nInstall_Path={cann}\n")
    env = {
        "info": {"CANN_INSTALL_INFO": tmp_path / "info"},
        "home": {"ASCEND_HOME_PATH": cann},
        "home/latest": {"ASCEND_HOME_PATH": cann / "ascend-toolkit" / "latest"},
    }[how]
    done = env_npu(root, TASK_QUEUE_ENABLE=1, **env)
    lines = done.stdout.splitlines()
    assert "status 0" in lines and "CANN_WAS_HERE=yes:" in lines
    assert "HCCL_WHITELIST_DISABLE=1" in lines and "COMBINED_ENABLE=1" in lines
    assert "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True" in lines
    assert "TASK_QUEUE_ENABLE=1" in lines  # the user's
    assert "UNSET_IS_AN_ERROR_AGAIN: unbound variable" in done.stderr


def test_no_cann_is_one_line(root, tmp_path):
    if Path("/usr/local/Ascend").exists():
        pytest.skip("there is a CANN here")
    done = env_npu(root, CANN_INSTALL_INFO=tmp_path / "none")
    assert "status 1" in done.stdout and "TASK_QUEUE_ENABLE" not in done.stdout
    first = done.stderr.splitlines()[0]
    assert first.startswith("error: no CANN found") and "install Ascend's CANN toolkit" in first
    done = subprocess.run(
        ["bash", "test/env_npu.sh"],
        cwd=root,
        capture_output=True,
        text=True,
        env=environment(HOME="/nowhere", CANN_INSTALL_INFO=tmp_path / "none"),
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "device, installed, seen", [("auto", True, "yes:"), ("auto", False, None), ("cpu", True, None)]
)
def test_cann_s_environment_is_set_for_the_npu_only(project, cann, tmp_path, device, installed, seen):
    (tmp_path / "torch_npu.py").touch()
    run = launch(
        project,
        "train_full_1p",
        f"--device_type={device}",
        ASCEND_HOME_PATH=cann,
        PYTHONPATH=tmp_path if installed else "",
    )
    assert run.status == 0 and run.got[0]["CANN_WAS_HERE"] == seen


@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_launcher_is_a_handful_of_lines(root, script):
    text = (root / "test" / f"{script}.sh").read_text()
    assert len(text.splitlines()) <= 7 and 'common.sh"\nlaunch ' in text
    assert os.access(root / "test" / f"{script}.sh", os.X_OK)
