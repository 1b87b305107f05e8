"""Counters of a server with several processes, in memory that they share, as Prometheus reads them."""

from __future__ import annotations

import ctypes
from multiprocessing.sharedctypes import RawArray

import numpy as np

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
STATUSES = (200, 400, 401, 403, 404, 405, 408, 413, 415, 422, 500, 503, 504)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One row of counters for each of `workers` processes: a process writes only its own, so no lock is needed."""

    def __init__(self, routes: list, workers: int = 1, shared=None):
        self.routes = [*routes, "other"]
        self._width = len(self.routes) * (len(STATUSES) + len(SECONDS) + 2) + len(BATCHES) + 2
        self.shared = shared if shared is not None else RawArray(ctypes.c_double, workers * self._width)
        self._table = np.frombuffer(self.shared, np.float64).reshape(workers, self._width)
        self._row = self._table[0]

    def use_row(self, worker: int) -> None:
        self._row = self._table[worker]

    def request(self, route: str, status: int, seconds: float) -> None:
        place = self._place(route)
        self._row[place + STATUSES.index(status if status in STATUSES else 500)] += 1
        place += len(STATUSES)
        self._row[place : place + 2] += seconds, 1
        self._row[place + 2 : place + 2 + len(SECONDS)] += np.asarray(SECONDS) >= seconds

    def batch(self, rows: int) -> None:
        self._row[-2:] += rows, 1
        self._row[-2 - len(BATCHES) : -2] += np.asarray(BATCHES) >= rows

    def _place(self, route: str) -> int:
        number = self.routes.index(route if route in self.routes else "other")
        return number * (len(STATUSES) + len(SECONDS) + 2)

    def text(self) -> str:
        """The sums over all processes, in Prometheus' text format."""
        total = self._table.sum(axis=0)
        lines = ["# TYPE face_requests_total counter"]
        for route in self.routes:
            place = self._place(route)
            lines += [
                f'face_requests_total{{route="{route}",status="{status}"}} {total[place + i]:.0f}'
                for i, status in enumerate(STATUSES)
                if total[place + i]
            ]
        lines.append("# TYPE face_request_seconds histogram")
        for route in self.routes:
            place = self._place(route) + len(STATUSES)
            if total[place + 1]:
                lines += _histogram("face_request_seconds", f'route="{route}",', SECONDS, total[place:])
        batches = np.concatenate([total[-2:], total[-2 - len(BATCHES) : -2]])
        lines.append("# TYPE face_batch_rows histogram")
        return "\n".join(lines + _histogram("face_batch_rows", "", BATCHES, batches)) + "\n"


def _histogram(name: str, labels: str, bounds, values) -> list:
    """values: sum, count, then how many were within each bound."""
    lines = [f'{name}_bucket{{{labels}le="{bound:g}"}} {values[2 + i]:.0f}' for i, bound in enumerate(bounds)]
    lines.append(f'{name}_bucket{{{labels}le="+Inf"}} {values[1]:.0f}')
    bare = f"{{{labels[:-1]}}}" if labels else ""
    return [*lines, f"{name}_sum{bare} {values[0]:.6f}", f"{name}_count{bare} {values[1]:.0f}"]
