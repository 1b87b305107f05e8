"""Faults put into running trainings, and what is left after each:

    python -m scripts.fault_rounds                    # every kind, a few rounds of each
    python -m scripts.fault_rounds kill --rounds=50   # SIGKILL of one of two ranks while a checkpoint is written
    python -m scripts.fault_rounds write --rounds=200 # ENOSPC and EIO at the n-th write, n = 1, 2, 3, ...

A round trains with the fault, then resumes without it and trains to the end. It passes if the first run ended by itself
(or was killed) without a traceback, at most with one error line a rank; if what resumes is whole and not older than the
last checkpoint that was reported; and if every step's loss, whenever it was computed, is that of a run without faults.
Needs a C compiler for faults.c. The trained set is synthetic, the network tiny.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from runtime.errors import CheckpointError
from runtime.log import run_command

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = """
import torch
import model

@model.register("fault_net")
def make(embedding_size):
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 7, 16), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(8 * 7 * 7, embedding_size),
    )
"""
OPTIONS = [
    "--net_mode=fault_net",
    "--embedding_size=16",
    "--device_type=cpu",
    "--batch_size=8",
    "--epochs=2",
    "--max_iter=8",
    "--save_every=2",
    "--keep=2",
    "--log_every=1",
    "--sample_rate=0.5",
    "--with_test=false",
    "--tensorboard=false",
    "--dist_timeout=20",
]
STEPS = 16
GUARD_S = 300  # a run that takes longer hangs


class Lab:
    """A folder with a set, a network and the losses of a run without faults; `round` is one fault and what follows."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.chance, self.numbers = folder, random.Random(seed), itertools.count(1)
        (folder / "fault_net.py").write_text(PLUGIN)
        library = folder / "faults.so"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", library, ROOT / "scripts" / "faults.c", "-ldl"], check=True
        )
        small = [
            "--identities=8",
            "--images_per_identity=16",
            "--verify_identities=10",
            "--verify_images=2",
            "--pairs=20",
        ]
        subprocess.run(
            [sys.executable, "-m", "data.synthetic", f"--output={folder / 'set'}", *small],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.environ["LD_PRELOAD"] = str(library)  # of the server from which all runs fork
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "learner", "torch._dynamo"])
        self.truth = {}

    def reference(self, ranks: int) -> dict:
        """{step: loss} of a run of so many ranks without faults."""
        if ranks not in self.truth:
            run = Run(self, "pth", ranks)
            run.start().wait()
            run.expect(0)
            self.truth[ranks] = run.losses()
            assert len(self.truth[ranks]) == STEPS
        return self.truth[ranks]


class Run:
    """One work_path, and the trainings in it."""

    def __init__(self, lab: Lab, checkpoint: str, ranks: int = 1, *options: str):
        self.lab, self.checkpoint, self.ranks, self.options = lab, checkpoint, ranks, options
        self.path = lab.folder / f"run_{next(lab.numbers)}"
        self.log = self.path / "log"
        self.checkpoints = self.path / ("sharded" if checkpoint == "sharded" else "models")
        self.log.mkdir(parents=True)
        self.outputs, self.processes = [], []

    def start(self, *options: str, fault: tuple = (), clock: int = 0) -> Run:
        """fault: (folder, first, every, errno) for faults.c, on every rank. clock: seconds that it is off."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = [
            *OPTIONS, f"--plugin={self.lab.folder / 'fault_net.py'}", f"--data_path={self.lab.folder / 'set'}",
            f"--work_path={self.path}", f"--run_dir={self.log}", f"--checkpoint={self.checkpoint}", "--num_workers=0",
            *self.options, *options,
        ]  # fmt: skip
        shared = {"WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks, "MASTER_ADDR": "127.0.0.1"}
        number, self.processes = len(self.outputs) // self.ranks, []
        for rank in range(self.ranks):
            variables = {**shared, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
            self.outputs.append(self.path / f"output_{number}_{rank}.txt")
            process = self.lab.context.Process(
                target=_train, args=(arguments, variables, self.outputs[-1], fault, clock)
            )
            process.start()
            self.processes.append(process)
        return self

    def output(self) -> str:
        """What the ranks of the last start have said."""
        return "".join(path.read_text(errors="replace") for path in self.outputs[-self.ranks :] if path.exists())

    def until(self, ready) -> None:
        """Waits until ready(), or until a rank has ended."""
        end = time.monotonic() + GUARD_S
        while not ready() and all(process.is_alive() for process in self.processes):
            if time.monotonic() > end:
                self.fail("hangs")
            time.sleep(0.001)

    def wait(self) -> None:
        for process in self.processes:
            process.join(GUARD_S)
            if process.is_alive():
                self.fail("hangs")

    def fail(self, what: str):
        for process in self.processes:
            process.kill()
        raise CheckpointError(f"{self.path}: {what}: {self.output()[-2000:]}")

    def expect(self, *codes: int) -> None:
        """What a run may end with, and that it ended in plain words."""
        found = [process.exitcode for process in self.processes]
        if not set(found) <= set(codes):
            self.fail(f"ended with {found}, not with {codes}")
        for path in self.outputs[-self.ranks :]:
            text = path.read_text(errors="replace")
            if "Traceback" in text or text.count("error: ") > 1:
                self.fail("a traceback, or more than one error")

    def half_written(self) -> set:
        return {path.name for path in self.checkpoints.glob(".*.tmp")}

    def losses(self) -> dict:
        """{step: loss} of every run in this work_path; steps computed twice must agree."""
        found = {}
        for line in (self.log / "metrics.jsonl").read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a line that a fault cut off
            if record["kind"] == "step" and found.setdefault(record["step"], record["loss"]) != record["loss"]:
                self.fail(f"step {record['step']}: loss {record['loss']}, {found[record['step']]} before")
        return found

    def resume(self) -> str:
        """Trains to the end without faults; says where it went on."""
        said = max([int(step) for step in re.findall(r"saved \S*step_(\d+)", self.output())], default=0)
        self.start("--resume=auto").wait()
        self.expect(0)
        resumed = int((re.search(r"resumed .* at step (\d+)", self.output()) or [0, 0])[1])
        if resumed < said:
            self.fail(f"step {said} was reported as saved, the run resumed at {resumed}")
        truth = self.lab.reference(self.ranks)
        for step, loss in self.losses().items():
            if truth[step] != loss:
                self.fail(f"step {step}: loss {loss}, {truth[step]} without faults")
        if resumed < STEPS and STEPS not in self.losses():
            self.fail("did not come to the end")
        shutil.rmtree(self.path)
        return f"resumed at step {resumed}"


def _train(arguments: list, variables: dict, output: Path, fault: tuple, clock: int) -> None:
    with open(output, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.chdir(ROOT)
    sys.argv = ["train.py", *arguments]
    library = ctypes.CDLL(None)
    library.fault_clock(ctypes.c_long(clock))
    if fault:
        folder, first, every, code = fault
        library.fault_set(str(folder).encode(), ctypes.c_long(first), ctypes.c_long(every), code)
    import train

    run_command(train.main)


# --- the faults ------------------------------------------------------------------------------------------------------


def kill(lab: Lab, number: int) -> str:
    """SIGKILL of one of two ranks while a checkpoint is written: the other must end by itself."""
    run = Run(lab, ("sharded", "pth")[number % 2], 2)
    run.start()
    for _save in range(lab.chance.randrange(3)):
        run.until(lambda: run.half_written())
        run.until(lambda: not run.half_written())
    run.until(lambda: run.half_written())
    time.sleep(lab.chance.random() * 0.01)
    victim = lab.chance.randrange(2)
    os.kill(run.processes[victim].pid, signal.SIGKILL)
    caught = bool(run.half_written())
    run.wait()
    run.expect(-signal.SIGKILL, 1, 0)
    return f"rank {victim} of 2 killed {'while' if caught else 'just after'} saving {run.checkpoint}, {run.resume()}"


def stop(lab: Lab, number: int) -> str:
    """SIGSTOP of one of two ranks: for a moment, which changes nothing; or for good, which the other reports."""
    run = Run(lab, ("sharded", "pth")[number // 2 % 2], 2)
    run.start()
    run.until(lambda: re.search(r"step 2/", run.output()))
    victim = run.processes[lab.chance.randrange(2)]
    os.kill(victim.pid, signal.SIGSTOP)
    if number % 2 == 0:
        time.sleep(3)
        os.kill(victim.pid, signal.SIGCONT)
        run.wait()
        run.expect(0)
        return f"stopped for 3 s and went on, {run.resume()}"
    run.until(lambda: False)
    victim.kill()
    run.wait()
    run.expect(-signal.SIGKILL, 1)
    if "error: " not in run.output():
        run.fail("the other rank said nothing")
    return f"stopped for good: the other rank said so, {run.resume()}"


def write(lab: Lab, number: int) -> str:
    """ENOSPC and EIO at the n-th write below the folder of checkpoints."""
    code, checkpoint = (errno.ENOSPC, errno.EIO)[number % 2], ("sharded", "pth")[number // 2 % 2]
    run, first = Run(lab, checkpoint), 1 + number // 4
    run.checkpoints.mkdir()
    run.start(fault=(run.checkpoints, first, 0, code)).wait()
    run.expect(0, 1)
    ended = run.processes[0].exitcode
    return f"{errno.errorcode[code]} at write {first} of {checkpoint}: ended with {ended}, {run.resume()}"


def full(lab: Lab, number: int) -> str:
    """A disk that is full from some write on."""
    checkpoint = ("sharded", "pth")[number % 2]
    run, first = Run(lab, checkpoint), lab.chance.randrange(1, 120)
    run.checkpoints.mkdir()
    run.start(fault=(run.checkpoints, first, 1, errno.ENOSPC)).wait()
    run.expect(0, 1)
    return f"full from write {first} of {checkpoint} on: ended with {run.processes[0].exitcode}, {run.resume()}"


def logs(lab: Lab, number: int) -> str:
    """A full disk for the logs: the training goes on, and says what it cannot write."""
    run = Run(lab, ("sharded", "pth")[number % 2])
    run.start(fault=(run.log, 1 + number // 2, 1, errno.ENOSPC)).wait()
    run.expect(0)
    return f"logs full from write {1 + number // 2} on: trained to the end, {run.resume()}"


def worker(lab: Lab, number: int) -> str:
    """A loader's process is killed."""
    run = Run(lab, ("sharded", "pth")[number % 2])
    run.start("--num_workers=2")
    run.until(lambda: re.search(r"step 2/", run.output()))
    pid = run.processes[0].pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    if children:
        os.kill(int(lab.chance.choice(children)), signal.SIGKILL)
    run.wait()
    run.expect(1)
    return f"a worker of {len(children)} killed, {run.resume()}"


def store(lab: Lab, number: int) -> str:
    """A remote store that takes connections and never answers: known at the start."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        threading.Thread(target=_swallow, args=(silent,), daemon=True).start()
        run = Run(lab, "sharded")
        run.start(f"--fs_name=webhdfs://127.0.0.1:{silent.getsockname()[1]}", "--fs_dir_for_save=runs").wait()
        run.expect(1)
    return f"a store that does not answer: {run.output().strip().splitlines()[-1][:120]}; {run.resume()}"


def _swallow(silent) -> None:
    kept = []
    while True:
        try:
            kept.append(silent.accept())
        except OSError:
            return


def clock(lab: Lab, number: int) -> str:
    """The clock jumps a year back, or forth and back, between two runs."""
    run = Run(lab, ("sharded", "pth")[number % 2])
    year = 365 * 86400
    run.start("--epochs=1", clock=0 if number // 2 % 2 else year).wait()
    run.expect(0)
    run.start("--resume=auto", "--max_iter=8", clock=-year)
    run.until(lambda: re.search(r"step 4/8", run.output()[run.output().find("resumed") :]))
    for process in run.processes:
        process.kill()
    run.wait()
    return f"a jump of the clock, {run.resume()}"


FAULTS = {f.__name__: f for f in (kill, stop, write, full, logs, worker, store, clock)}


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        "python -m scripts.fault_rounds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faults", nargs="*", help=f"of {', '.join(FAULTS)} (all)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name in options.faults:
        if name not in FAULTS:
            parser.error(f"{name}: choose from {', '.join(FAULTS)}")
    if not shutil.which("cc"):
        raise CheckpointError("cc: there is no C compiler here, and faults.c needs one: install gcc")
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), options.seed)
        for name in options.faults or FAULTS:
            for number in range(options.first, options.first + options.rounds):
                print(f"{name} {number}: {FAULTS[name](lab, number)}", flush=True)
            print(f"{name}: {options.rounds} rounds passed", flush=True)


if __name__ == "__main__":
    run_command(main)
