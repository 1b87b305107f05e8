"""Images per second over all ranks, measured so that it can be compared."""

from __future__ import annotations

import time
from contextlib import contextmanager

from runtime.device import Device

# The first steps compile kernels, fill caches and start workers: they do not count as speed.
WARMUP_STEPS = 5


class Speed:
    """Without the first `warmup` steps, the device synchronised at both ends of what is measured.

    images_a_step: of all ranks together.
    """

    def __init__(self, device: Device, images_a_step: int, warmup: int = WARMUP_STEPS):
        self.device, self.images_a_step, self.warmup = device, images_a_step, warmup
        self.seconds, self.steps = 0.0, 0
        self._since: float | None = None  # begin of the stretch that is being measured
        self._total, self._begun, self._rate = 0, 0, 0.0
        self._mark = (0.0, 0)

    def start(self) -> None:
        if self.warmup == 0:
            self._begin()
        self._mark = (time.perf_counter(), self._total)

    def _begin(self) -> None:
        self.device.synchronize()
        self._since, self._begun = time.perf_counter(), self._total

    def step(self) -> None:
        self._total += 1
        if self.warmup:
            self.warmup -= 1
            if self.warmup == 0:
                self._begin()

    def stop(self) -> None:
        if self._since is not None:
            self.device.synchronize()
            self.seconds += time.perf_counter() - self._since
            self.steps += self._total - self._begun
            self._since = None

    @contextmanager
    def paused(self):
        running = self._since is not None
        self.stop()
        yield
        if running:
            self._begin()

    def recent(self) -> float:
        """Images a second since the last call, for the log and the bar; not synchronised."""
        (then, at), now = self._mark, time.perf_counter()
        if self._total > at:
            self._rate = (self._total - at) * self.images_a_step / (now - then)
            self._mark = (now, self._total)
        return self._rate

    def window(self) -> dict:
        images = self.steps * self.images_a_step
        return {
            "images": images,
            "seconds": self.seconds,
            "steps": self.steps,
            "images_per_s": images / self.seconds if self.seconds else None,
        }
