"""A bar for what takes a while, with the time left, on the terminal that the user looks at."""

from __future__ import annotations

import functools
import os
import sys


def progress(total: int | None, desc: str, unit: str, initial: int = 0, shown: bool = True):
    """A tqdm bar on stderr where that is a terminal; elsewhere a disabled one (`.disable`), which costs nothing.

    Under a launcher stderr goes through tee into a log: the bar goes to the terminal that the launcher names in
    PROGRESS_TERMINAL. shown: False for a bar that is not wanted, as on other ranks than 0.
    """
    from tqdm import tqdm

    terminal = _terminal() if shown else None
    return tqdm(
        total=total, initial=initial, desc=desc, unit=unit, dynamic_ncols=True, file=terminal, disable=terminal is None
    )


def ticking(bar):
    """(done, total) -> the bar moved on by `done` of `total`: for work that knows its size only when it has begun."""

    def tick(done: int, total: int) -> None:
        bar.total = total
        bar.update(done)

    return tick


@functools.cache
def _terminal():
    if sys.stderr.isatty():
        return sys.stderr
    try:
        number = os.open(os.environ["PROGRESS_TERMINAL"], os.O_WRONLY | os.O_NOCTTY)
    except (KeyError, OSError):
        return None
    return open(number, "w") if os.isatty(number) else os.close(number)
