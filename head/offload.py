"""Momentum that lives in host memory, brought to the device a chunk ahead of the update and written back behind it.

One thread does the host's part in order, on all of the rank's cores: it collects a chunk's rows into pinned memory and
copies them over on a stream of its own, while the chunk before is being computed; after the update it waits for the
copy back and spreads the rows into the table. (Kernels that address pinned memory need none of this: see `HeadOp`.)
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch

from head.storage import table_of


class HostTable:
    """A table (`head.storage`) in host memory, used by `device`. threads: cores that collect and spread its rows."""

    def __init__(self, table, device: torch.device, threads: int = 1):
        self.table, self.device, self.threads = table, device, threads
        self._worker = None
        self._last = None  # the newest rows on their way home
        # the modules of all accelerators have the same functions; a CPU has no streams and runs the same steps in order
        self._api = None if device.type == "cpu" else getattr(torch, device.type)
        self._stream = None

    def fetch(self, where):
        """Starts to bring these rows (a slice, or row numbers on the host) to the device; for `take`."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "host rows", self._start)
            self._stream = self._api.Stream(device=self.device) if self._api else None
        return self._worker.submit(self._fetch, where, self._mark())

    def _start(self) -> None:
        """In the worker. A new thread has no device of its own: on an NPU its first question would open NPU 0."""
        torch.set_num_threads(self.threads)
        if self._api:
            self._api.set_device(self.device)

    def take(self, fetching):
        """A table of the rows that `fetch` began to bring; the current stream waits for it."""
        moved, done = fetching.result()
        if done is not None:
            current = self._api.current_stream(self.device)
            current.wait_event(done)
            for rows in moved.values():
                rows.record_stream(current)
        return table_of(moved, self.table.work_dtype)

    def write_back(self, where, table) -> None:
        """Starts to bring the rows of `take`, as they are now, home."""
        if self._last is not None and self._last.done():
            self._last.result()  # raises what went wrong there
        self._last = self._worker.submit(self._write_back, where, table.tensors(), self._mark())

    def flush(self) -> None:
        """Waits until every row that was written back is in the table."""
        if self._last is not None:
            self._last.result()

    def tensors(self) -> dict:
        self.flush()
        return self.table.tensors()

    def _mark(self):
        """An event behind what the caller has queued on the device so far."""
        return self._api.current_stream(self.device).record_event() if self._api else None

    def _on_stream(self):
        return self._api.stream(self._stream) if self._api else nullcontext()

    def _fetch(self, where, ready):
        with torch.no_grad(), self._on_stream():
            if ready is not None:
                self._stream.wait_event(ready)
            moved = {}
            for name, data in self.table.tensors().items():
                count = where.stop - where.start if isinstance(where, slice) else len(where)
                rows = torch.empty(count, data.shape[1], dtype=data.dtype, pin_memory=self._api is not None)
                if isinstance(where, slice):
                    rows.copy_(data[where])
                else:
                    torch.index_select(_words(data), 0, where, out=_words(rows))
                moved[name] = rows.to(self.device, non_blocking=True)
            return moved, self._stream.record_event() if self._api else None

    def _write_back(self, where, tensors, ready):
        with torch.no_grad(), self._on_stream():
            if ready is not None:
                self._stream.wait_event(ready)
            for name, data in self.table.tensors().items():
                rows = tensors[name]
                if self._api:  # torch keeps freed pinned memory, so a chunk's is the last one's again
                    rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
                    self._stream.synchronize()
                _words(data)[where] = _words(rows)


def _words(data: torch.Tensor) -> torch.Tensor:
    """The same memory in elements of 8 bytes, where rows are multiples of that: moving bytes one by one is slow."""
    if data.shape[1] * data.element_size() % 8:
        return data
    try:
        return data.view(torch.int64)
    except RuntimeError:  # torch 1.8 views as types of the same size only
        return data
