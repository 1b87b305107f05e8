"""Run a function as several ranks over gloo on this machine, and get what each returned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from multiprocessing.connection import wait

# Ranks fork from one server process that has imported torch already, and what DistributedDataParallel imports late:
# that is most of a small test's time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo"])
NOTHING = (False, "")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(fn, size, *args, timeout=900, dist_timeout=300) -> list:
    """fn(world, *args) on `size` ranks -> what each returned, in rank order.

    fn: a function at the top of a module that a new process can import (test/workers_*.py).
    timeout: seconds until all ranks are killed and TimeoutError names those that had not answered.
    dist_timeout: open_world's timeout_s. Raises RuntimeError with every failed rank's traceback.
    """
    port = free_port()
    job = pickle.dumps((fn, args))
    ranks, pipes = [], []
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        env = {
            **os.environ,
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        process = _CONTEXT.Process(target=_rank, args=(theirs, job, env, dist_timeout), daemon=True)
        process.start()
        theirs.close()
        ranks.append(process)
        pipes.append(ours)
    answers = {}
    try:
        answers.update(_collect(pipes, time.monotonic() + timeout))
    finally:
        for rank, process in enumerate(ranks):
            if rank in answers:
                process.join(10)
            process.kill()
            process.join()
            if answers.get(rank) == NOTHING:
                answers[rank] = (False, f"ended without an answer, exit code {process.exitcode}")
    silent = [r for r in range(size) if r not in answers]
    failed = [f"rank {r}:\n{text}" for r, (good, text) in sorted(answers.items()) if not good]
    if failed:
        raise RuntimeError("\n".join(failed))
    if silent:
        raise TimeoutError(f"no answer from rank {', '.join(map(str, silent))} of {size} within {timeout} s")
    return [pickle.loads(answers[r][1]) for r in range(size)]


def _collect(pipes, end) -> dict:
    answers = {}
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes and time.monotonic() < end:
        for pipe in wait(list(open_pipes), timeout=max(0.0, end - time.monotonic())):
            rank = open_pipes.pop(pipe)
            try:
                answers[rank] = pipe.recv()
            except EOFError:
                answers[rank] = NOTHING
    return answers


def _rank(pipe, job, env, dist_timeout):
    os.environ.update({name: str(value) for name, value in env.items()})
    try:
        import torch

        from runtime.device import Device
        from runtime.dist import open_world

        torch.set_num_threads(1)
        fn, args = pickle.loads(job)
        with open_world(Device("cpu"), dist_timeout) as world:
            result = fn(world, *args)
        pipe.send((True, pickle.dumps(result)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
