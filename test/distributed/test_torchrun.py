"""Under torchrun: several agents are one world, and a job comes back by itself, also with fewer ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_set import make_tiny_set

from checkpoint import sharded

pytestmark = [
    pytest.mark.skipif(not sharded.available(), reason="needs torch 2.3"),
    pytest.mark.skipif(importlib.util.find_spec("torch.distributed.run") is None, reason="no torchrun"),
]
PATIENCE_S = 200


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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


def training(tmp_path, epochs) -> list:
    """train.py for torchrun: five steps an epoch, a checkpoint every second step, from the newest one if there is."""
    options = dict(
        net_mode="mobilefacenet",
        embedding_size=16,
        data_path=make_tiny_set(tmp_path / "set"),
        batch_size=4,
        epochs=epochs,
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


def losses(tmp_path) -> dict:
    """{step: loss}; a step that was computed again has to have the same loss."""
    found = {}
    for line in metrics(tmp_path):
        if line["kind"] == "step":
            assert found.setdefault(line["step"], line["loss"]) == line["loss"], line["step"]
    return found


def has_saved(tmp_path):
    return lambda: sharded.newest(tmp_path / "work/sharded") is not None


def test_two_agents_of_two_ranks_are_four_ranks(tmp_path):
    script, port, log = Path(__file__).parents[1] / "torchrun_float64.py", free_port(), tmp_path / "log"
    common = ["--nproc-per-node=2", "--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    with agents(log, *([*common, f"--node-rank={node}", script, tmp_path / "two"] for node in (0, 1))) as started:
        assert [agent.wait(PATIENCE_S) for agent in started] == [0, 0], log.read_text()[-3000:]
    with agents(log, ["--nproc-per-node=4", f"--master-port={free_port()}", script, tmp_path / "one"]) as started:
        assert started[0].wait(PATIENCE_S) == 0, log.read_text()[-3000:]
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("two", "one"))
    assert two["size"] == one["size"] == 4 and len(one["losses"]) == 3
    assert two["losses"] == one["losses"]


def test_a_killed_rank_brings_the_job_back(tmp_path):
    log = tmp_path / "log"
    command = ["--nproc-per-node=2", "--max-restarts=1", f"--master-port={free_port()}", *training(tmp_path, 6)]
    with agents(log, command) as (agent,):
        wait_for(has_saved(tmp_path), log)
        os.kill(ranks_of(agent)[-1], signal.SIGKILL)
        assert agent.wait(PATIENCE_S) == 0, log.read_text()[-3000:]
    runs = [line["world_size"] for line in metrics(tmp_path) if line["kind"] == "run"]
    assert runs == [2, 2] and metrics(tmp_path)[-1]["reason"] == "finished"
    assert sorted(losses(tmp_path)) == list(range(1, 31))


def test_a_killed_rank_brings_the_job_back_on_two_machines(tmp_path):
    """Each agent counts its own restarts, so they need not be at the same number."""
    log = tmp_path / "log"
    shared = ["--nproc-per-node=1", "--nnodes=2", "--max-restarts=2", *meeting(free_port())]
    with agents(log, *([*shared, f"--rdzv-conf=is_host={host}", *training(tmp_path, 5)] for host in (1, 0))) as both:
        wait_for(has_saved(tmp_path), log)
        os.kill(ranks_of(both[1])[0], signal.SIGKILL)
        assert [agent.wait(PATIENCE_S) for agent in both] == [0, 0], log.read_text()[-3000:]
    assert {line["world_size"] for line in metrics(tmp_path) if line["kind"] == "run"} == {2}
    assert sorted(losses(tmp_path)) == list(range(1, 26))


def test_the_job_goes_on_with_the_machine_that_is_left(tmp_path):
    log = tmp_path / "log"
    shared = ["--nproc-per-node=1", "--nnodes=1:2", "--max-restarts=3", *meeting(free_port())]
    with agents(
        log, *([*shared, f"--rdzv-conf=last_call_timeout=5,is_host={host}", *training(tmp_path, 12)] for host in (1, 0))
    ) as (stays, goes):
        wait_for(has_saved(tmp_path), log)
        kill(goes)
        assert stays.wait(PATIENCE_S) == 0, log.read_text()[-3000:]
    runs = [line["world_size"] for line in metrics(tmp_path) if line["kind"] == "run"]
    assert runs[0] == 2 and runs[-1] == 1 and metrics(tmp_path)[-1]["steps"] == 60


def meeting(port) -> list:
    return ["--rdzv-backend=c10d", "--rdzv-id=test", f"--rdzv-endpoint=127.0.0.1:{port}"]
