"""Kills a real training run again and again, and checks that it always goes on from a whole checkpoint:

    python -m scripts.kill_rounds --rounds=50

Each round resumes the run, waits for a random moment (every other time, one while a checkpoint is being written) and
sends SIGKILL to all its ranks. Afterwards the newest checkpoint must be whole, not older than the last that the run
reported, and the loss of every step must be the same in every round that computed it. The trained set is synthetic.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checkpoint import sharded, store
from runtime.errors import CheckpointError
from runtime.log import run_command

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [
    "train.py",
    "--net_mode=mobilefacenet",
    "--device_type=cpu",
    "--batch_size=8",
    "--num_workers=0",
    "--epochs=1000",
    "--with_test=false",
    "--tensorboard=false",
    "--log_every=1",
    "--save_every=2",
    "--keep=2",
    "--sample_rate=0.5",
]


def main(arguments=None) -> None:
    options = _parser().parse_args(arguments)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "data.synthetic",
                f"--output={work / 'set'}",
                "--identities=8",
                "--images_per_identity=10",
                "--verify_identities=10",
                "--verify_images=2",
                "--pairs=20",
            ],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        saved = while_saving = 0
        for number in range(1, options.rounds + 1):
            resumed, saved, caught = _round(work, options, chance, saved, aim_at_saving=number % 2 == 0)
            while_saving += caught
            print(
                f"round {number}: resumed at step {resumed}, killed {'while saving' if caught else 'in between'}, "
                f"step {saved} is whole",
                flush=True,
            )
        steps = _check_losses(work / "run" / "log" / "metrics.jsonl")
    print(
        f"{options.rounds} kills on {options.ranks} rank(s), {while_saving} of them while saving: always resumed "
        f"from a whole checkpoint; {steps} steps, each with the same loss whenever it was computed"
    )


def _round(work: Path, options, chance, saved: int, aim_at_saving: bool) -> tuple:
    """(step resumed at, step of the newest whole checkpoint, whether the kill fell into a save)."""
    run, folder = work / "run", work / "run" / ("sharded" if options.checkpoint == "sharded" else "models")
    command = [
        sys.executable,
        *TRAIN,
        f"--data_path={work / 'set'}",
        f"--work_path={run}",
        f"--checkpoint={options.checkpoint}",
        *(["--resume=auto"] if saved else []),
    ]
    left_over = _half_written(folder)
    output = work / f"output_{len(list(work.glob('output_*')))}.txt"
    ranks = _start(command, options.ranks, output)
    try:
        _wait(ranks, output, lambda: re.search(r"^.*\bsaved ", output.read_text(), re.MULTILINE))
        time.sleep(chance.random() * options.seconds)
        if aim_at_saving:
            _wait(ranks, output, lambda: _half_written(folder) - left_over)
            time.sleep(chance.random() * 0.02)
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.wait()
    text = output.read_text()
    caught = bool(_half_written(folder) - left_over)
    resumed = int((re.search(r"resumed .* at step (\d+)", text) or [0, 0])[1])
    if resumed < saved:
        raise CheckpointError(f"{folder}: step {saved} was whole, the run resumed at {resumed}: a checkpoint is lost")
    told = [_step_of(Path(path)) for path in re.findall(r"saved (\S+)", text) if Path(path).exists()]
    newest = sharded.newest(folder) if options.checkpoint == "sharded" else store.newest(folder)
    step = _step_of(newest)
    if step < max([resumed, *told]):
        raise CheckpointError(f"{newest}: older than the last that was reported: a checkpoint is lost")
    return resumed, step, caught


def _half_written(folder: Path) -> set:
    """Temporary files and directories, told apart from those of the same name that an earlier kill left."""
    found = set()
    for path in folder.glob(".*.tmp"):
        try:
            found.add((path.name, path.stat().st_ino))
        except FileNotFoundError:  # published in between
            pass
    return found


def _step_of(path: Path) -> int:
    """Reads the whole checkpoint, checksums included."""
    state = sharded.load(path, {})[0] if path.is_dir() else store.load_pth(path)
    return state["training"]["step"]


def _start(command: list, ranks: int, output: Path) -> list:
    """The processes of all ranks, as torchrun would start them; torchrun itself would outlive them or they it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    started = []
    with open(output, "w") as file:
        for rank in range(ranks):
            variables = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
            started.append(subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment))
    return started


def _wait(ranks: list, output: Path, ready) -> None:
    end = time.monotonic() + 300
    while not ready():
        if any(process.poll() is not None for process in ranks) or time.monotonic() > end:
            raise CheckpointError(f"the run ended by itself or hangs: {output.read_text()[-500:]}")
        time.sleep(0.001)


def _check_losses(path: Path) -> int:
    losses = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line that a kill cut off
        if record["kind"] != "step":
            continue
        before, now = losses.setdefault(record["step"], record["loss"]), record["loss"]
        if before != now:
            raise CheckpointError(f"step {record['step']}: loss {now} after a kill, {before} before it")
    return len(losses)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.kill_rounds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--checkpoint", choices=("sharded", "pth"), default="sharded")
    parser.add_argument("--seconds", type=float, default=2.0, help="longest wait before a kill")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    run_command(main)
