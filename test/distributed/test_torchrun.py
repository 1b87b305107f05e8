"""Under torchrun: several agents are one world, and a job comes back by itself, also with fewer ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import workers_learner
from ranks import free_port, run_ranks
from tiny_set import make_tiny_set

from checkpoint import sharded

pytestmark = [
    pytest.mark.skipif(not sharded.available(), reason="needs torch 2.3"),
    pytest.mark.skipif(importlib.util.find_spec("torch.distributed.run") is None, reason="no torchrun"),
]
PATIENCE_S = 200


@contextmanager
def agents(log: Path, *commands):
    """torchrun once for each list of arguments, all killed with their ranks at the end; their output goes to log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    with open(log, "w") as file:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *map(str, command)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=Path(__file__).parents[2],
            )
            for command in commands
        ]
    try:
        yield started
    finally:
        for agent in started:
            kill(agent)


def kill(agent) -> None:
    for pid in [*ranks_of(agent), agent.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    agent.wait()


def ranks_of(agent) -> list:
    """The processes that an agent started, oldest first."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"\nPPid:\t{agent.pid}\n" in status.read_text():
                found.append(int(status.parent.name))
        except OSError:  # it ended in between
            pass
    return sorted(found)


def wait_for(ready, log: Path):
    end = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.05)


def training(tmp_path) -> list:
    """train.py for torchrun, without an end: a checkpoint every second step, and from the newest one if there is."""
    options = dict(
        plugin="test/tiny_net.py",
        net_mode="tiny",
        embedding_size=16,
        data_path=make_tiny_set(tmp_path / "set"),
        batch_size=4,
        epochs=100000,
        lr=1e-5,
        work_path=tmp_path / "work",
        device_type="cpu",
        num_workers=0,
        with_test=0,
        tensorboard=0,
        log_every=1,
        checkpoint="sharded",
        save_every=2,
        resume="auto",
        dist_timeout=60,
    )
    return ["train.py", *(f"--{name}={value}" for name, value in options.items())]


def metrics(tmp_path) -> list:
    lines = (tmp_path / "work/log/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]  # a kill may cut a line off


def losses(lines) -> dict:
    """{step: loss}; on as many ranks, a step that was computed again has to have the same loss."""
    found, size = {}, 0
    for line in lines:
        if line["kind"] == "run" and line["world_size"] != size:
            size, again = line["world_size"], set()
        if line["kind"] == "step":
            if line["step"] in again:
                assert found[line["step"]] == line["loss"], line["step"]
            found[line["step"]] = line["loss"]
            again.add(line["step"])
    return found


def test_two_agents_of_two_ranks_are_four_ranks(tmp_path):
    script, port, log = Path(__file__).parents[1] / "torchrun_float64.py", free_port(), tmp_path / "log"
    common = ["--nproc-per-node=2", "--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    with agents(log, *([*common, f"--node-rank={node}", script, tmp_path / "two"] for node in (0, 1))) as started:
        assert [agent.wait(PATIENCE_S) for agent in started] == [0, 0], log.read_text()[-3000:]
    two = json.loads((tmp_path / "two").read_text())
    one, *_ = run_ranks(workers_learner.train_in_float64, 4)
    assert two["size"] == 4 and len(one[0]) == 3
    assert two["losses"] == one[0]


def test_the_job_comes_back_after_a_killed_rank_and_goes_on_after_a_killed_machine(tmp_path):
    """Two agents, each a machine of one rank. Each counts its own restarts, so they need not be at the same number."""
    log = tmp_path / "log"
    shared = ["--nproc-per-node=1", "--nnodes=1:2", "--max-restarts=4", "--rdzv-backend=c10d", "--rdzv-id=test"]
    shared.append(f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    with agents(
        log, *([*shared, f"--rdzv-conf=last_call_timeout=5,is_host={host}", *training(tmp_path)] for host in (1, 0))
    ) as (stays, goes):
        wait_for(lambda: saved_by(tmp_path, runs=1), log)
        os.kill(ranks_of(goes)[0], signal.SIGKILL)
        wait_for(lambda: saved_by(tmp_path, runs=2), log)
        assert sizes(tmp_path) == [2, 2]
        kill(goes)
        wait_for(lambda: saved_by(tmp_path, runs=3), log)
        stays.terminate()
        stays.wait(PATIENCE_S)
    assert sizes(tmp_path) == [2, 2, 1]
    steps = losses(metrics(tmp_path))
    assert sorted(steps) == list(range(1, len(steps) + 1))


def sizes(tmp_path) -> list:
    """Of each start of the training, how many ranks it had."""
    return [line["world_size"] for line in metrics(tmp_path) if line["kind"] == "run"]


def saved_by(tmp_path, runs: int) -> bool:
    """Whether the run of this number has trained and saved something of its own."""
    lines = metrics(tmp_path) if (tmp_path / "work/log/metrics.jsonl").exists() else []
    starts = [i for i, line in enumerate(lines) if line["kind"] == "run"]
    newest = sharded.newest(tmp_path / "work/sharded")
    if len(starts) < runs or newest is None:
        return False
    steps = [line["step"] for line in lines[starts[runs - 1] :] if line["kind"] == "step"]
    return bool(steps) and int(newest.name.split("_")[1]) >= steps[0]
