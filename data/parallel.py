"""Work over many small items on all cores, in the items' own order, with a progress bar."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Callable, Optional

from tqdm import tqdm

from runtime.errors import DataError

MOST_WORKERS = 1024


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes(workers: Optional[int]) -> int:
    """`workers` itself, one a core for None; DataError where it is no number of processes."""
    if workers is None:
        return cores()
    if not 1 <= workers <= MOST_WORKERS:
        raise DataError(f"--workers {workers}: from 1 to {MOST_WORKERS} processes, or leave it out for one a core")
    return workers


def spread(
    function: Callable, jobs: Iterable, workers: Optional[int] = None, desc: str = "", unit: str = "image", size=None
) -> Iterator:
    """function(job) for each job, in order; `workers` processes (None: one a core; 1: this process).

    function: importable by name; what it raises is raised here, and no further job begins. size: job -> how far it
    moves the bar (None: 1). Raises DataError where a process is killed, for example for its memory.
    """
    jobs = list(jobs)
    workers = min(processes(workers), max(1, len(jobs)))
    sizes = [size(job) if size else 1 for job in jobs]
    with tqdm(total=sum(sizes), desc=desc, unit=unit, unit_scale=size is not None, disable=None) as bar:
        if workers == 1:
            for job, length in zip(jobs, sizes):
                yield function(job)
                bar.update(length)
            return
        with ProcessPoolExecutor(workers) as pool:
            futures = [pool.submit(function, job) for job in jobs]
            try:
                for future, length in zip(futures, sizes):
                    yield future.result()
                    bar.update(length)
            except BrokenProcessPool:
                raise DataError(f"{desc}: a worker process was killed: is there enough memory? Run it again") from None
            finally:
                for future in futures:
                    future.cancel()


def ranges(count: int, step: int = 256) -> list[range]:
    """range(count) in pieces, as jobs: one message to a process per image would cost more than the image."""
    return [range(start, min(start + step, count)) for start in range(0, count, step)]
