"""Dynamic batching: while one batch is computed the next one gathers; an idle model is never kept waiting."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from typing import Callable

import numpy as np

from runtime.errors import UserError


class Busy(UserError):
    """More is waiting than the server takes."""


class Batcher:
    """Gathers arrays [n, ...] from any threads into calls `compute(array)` of at most about `most` rows, on one thread.

    compute: [N, ...] -> [N, ...]. observe: called with the rows of each batch. Rows that wait are at most `capacity`.
    """

    def __init__(self, compute: Callable, most: int = 64, capacity: int = 4096, observe: Callable = lambda rows: None):
        self._compute, self._most, self._capacity, self._observe = compute, most, capacity, observe
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting, self._lock = 0, threading.Lock()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, rows: np.ndarray) -> Future:
        """A future of compute's rows for these. Raises Busy."""
        with self._lock:
            if self._waiting + len(rows) > self._capacity:
                raise Busy("the server is busy: try again")
            self._waiting += len(rows)
        future: Future = Future()
        self._queue.put((rows, future))
        return future

    def close(self) -> None:
        """What was submitted before is computed."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            jobs, rows = [first], len(first[0])
            while rows < self._most:
                try:
                    job = self._queue.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    self._queue.put(None)
                    break
                jobs.append(job)
                rows += len(job[0])
            with self._lock:
                self._waiting -= rows
            # a request that was given up meanwhile is not computed
            self._run([job for job in jobs if job[1].set_running_or_notify_cancel()])

    def _run(self, jobs) -> None:
        if not jobs:
            return
        try:
            together = np.concatenate([rows for rows, _ in jobs])
            self._observe(len(together))
            parts = [self._compute(together[i : i + self._most]) for i in range(0, len(together), self._most)]
            results = np.split(np.concatenate(parts), np.cumsum([len(rows) for rows, _ in jobs])[:-1])
        except BaseException as error:  # whoever waits must not wait for ever
            for _, future in jobs:
                future.set_exception(error)
            return
        for (_, future), result in zip(jobs, results):
            future.set_result(result)
