"""Rows of a table that lives in host memory, brought to the device for one step and back.

One thread does the host's part in order: it collects the rows into pinned memory and copies them over on a stream of
its own, beside the backbone's compute; after the update it waits for the copy back and spreads the rows into the
table. So a step's rows can be asked for while the step before is still being put away, and the two never touch a row
at once.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import copy

import torch


class HostTable:
    """A table (`head.storage`) on the host, used by `device`."""

    def __init__(self, table, device: torch.device):
        self.table, self.device = table, device
        self._worker = None
        self._putting = None  # the newest rows on their way home
        # the modules of all accelerators have the same functions; a CPU has no streams and runs the same steps in order
        self._api = None if device.type == "cpu" else getattr(torch, device.type)
        self._stream = None

    def stage(self, index_R) -> Staged:
        """Starts to bring the rows of index_R (all of them for None); their table is ready when it is asked for."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="host rows")
            self._stream = self._api.Stream(device=self.device) if self._api else None
        ready = self._mark()
        return Staged(self, index_R, self._worker.submit(self._fetch, index_R, ready, self._putting))

    def put(self, index_R, moved) -> None:
        """Starts to bring rows home."""
        self._putting = self._worker.submit(self._put, index_R, moved, self._mark())

    def flush(self) -> None:
        """Waits until every row that was given back is in the table."""
        if self._putting is not None:
            self._putting.result()

    def tensors(self) -> dict:
        self.flush()
        return self.table.tensors()

    def _mark(self):
        """An event behind what the caller has queued on the device so far."""
        return self._api.current_stream(self.device).record_event() if self._api else None

    def _on_stream(self):
        return self._api.stream(self._stream) if self._api else nullcontext()

    def _fetch(self, index_R, ready, putting):
        if putting is not None:
            putting.result()  # done, as this is the same thread; raises what went wrong there
        with torch.no_grad(), self._on_stream():
            if ready is not None:
                self._stream.wait_event(ready)
            index_R = None if index_R is None else index_R.cpu()
            moved = {}
            for name, data in self.table.tensors().items():
                rows = (
                    data
                    if index_R is None
                    else torch.index_select(
                        data, 0, index_R, out=self._pinned((index_R.shape[0], data.shape[1]), data.dtype)
                    )
                )
                moved[name] = rows.to(self.device, non_blocking=True) if self._api else rows.clone()
            return index_R, moved, self._stream.record_event() if self._api else None

    def _put(self, index_R, moved, ready):
        with torch.no_grad(), self._on_stream():
            if ready is not None:
                self._stream.wait_event(ready)
            for name, data in self.table.tensors().items():
                rows = moved[name]
                if self._api:
                    rows = self._pinned(rows.shape, rows.dtype).copy_(rows, non_blocking=True)
                    self._stream.synchronize()
                if index_R is None:
                    data.copy_(rows)
                else:
                    data[index_R] = rows

    def _pinned(self, shape, dtype):
        # torch keeps freed pinned memory, so a step's is the last one's again
        return torch.empty(shape, dtype=dtype, pin_memory=self._api is not None)


class Staged:
    """One step's rows of a HostTable, on the device."""

    def __init__(self, home: HostTable, index_R, fetching):
        self._home, self._index_R, self._fetching = home, index_R, fetching
        self._table = None

    def table(self):
        """A table like the home one whose row i is the i-th staged row; the current stream waits for it."""
        if self._table is None:
            self._index_R, moved, done = self._fetching.result()
            if done is not None:
                current = self._home._api.current_stream(self._home.device)
                current.wait_event(done)
                for rows in moved.values():
                    rows.record_stream(current)
            self._table = copy(self._home.table)
            self._table.data = moved[""]
            if "_scale" in moved:
                self._table.scale = moved["_scale"]
        return self._table

    def give_back(self) -> None:
        """The rows as they are now go home."""
        self._home.put(self._index_R, self._table.tensors())
