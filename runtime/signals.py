"""SIGINT and SIGTERM are noted, and acted on where the state is whole, by all ranks at the same step."""

from __future__ import annotations

import signal
import threading
import time

import torch

from runtime.dist import ALONE, World


class Stopped(Exception):
    """A signal asked the run to end. `signal_number` says which."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; the state is saved, --resume continues it")
        self.signal_number = signal_number


FAILED = 1 << 10  # beside the numbers of signals: a rank cannot go on


class StopSignals:
    """While open, SIGINT and SIGTERM do not end the process; `asked` says that one came, or that a rank gave up.

    Ranks have to leave together. Asking them costs an accelerator a wait for everything that is queued, so they ask
    one another about every `every_s` seconds: a preempted machine grants some thirty.
    """

    def __init__(self, world: World = ALONE, every_s: float = 2.0):
        self._world, self._every_s = world, every_s
        self._caught = 0
        self._handlers: dict = {}
        self._wait = 1  # steps until the ranks ask again, the same number on each
        self._last = (0, 0.0)  # step and time at which they asked

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_error) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        if self._caught != FAILED:
            self._caught = number

    @property
    def here(self) -> int:
        """The signal that this rank got; 0 for none. The others may not have got it."""
        return self._caught

    def give_up(self) -> None:
        """This rank cannot go on: `asked` says FAILED on all of them the next time that they ask one another."""
        self._caught = FAILED

    def asked(self, step: int, now: bool = False) -> int:
        """The signal on which all ranks leave after `step`, FAILED, or 0. Call it on all ranks, after every step.

        now: the ranks ask one another at once."""
        if self._world.size == 1:
            return self._caught
        last, then = self._last
        if step - last < self._wait and not now:
            return 0
        here = time.monotonic()
        seconds_a_step = (here - then) / (step - last) if then and step > last else self._every_s
        told = torch.tensor([self._caught, seconds_a_step], dtype=torch.float32, device=self._world.device)
        number, seconds_a_step = self._world.all_reduce_(told, "max").tolist()
        self._last = (step, here)
        # tripled at the most, so that a first step that compiles, or a pause, does not decide for long
        self._wait = max(1, min(3 * self._wait, int(self._every_s / max(seconds_a_step, 1e-6))))
        return int(number)
