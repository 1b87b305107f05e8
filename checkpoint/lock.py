"""One run at a time writes to a folder, and a second one is told who holds it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import time
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import CheckpointError
from runtime.log import command_line

log = logging.getLogger(__name__)

NAME = ".lock"


@contextmanager
def held(folder, option: str = "--work_path"):
    """While open, no other process can hold `folder`, on any machine that sees it. The lock goes with the process,
    however that ends; the file stays, and says who held it last.

    Raises CheckpointError, naming the holder, where there is one. Where the file system has no locks, that is logged.
    """
    path = Path(folder) / NAME
    with open(path, "a+", encoding="utf-8") as file:
        try:
            # Of the process, not of the open file: a loader's worker that outlives a killed run does not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise CheckpointError(
                f"{folder}: another run writes here ({_holder(path)}): wait for it, or choose another {option}"
            ) from None
        except OSError as error:
            log.warning("%s: cannot be locked (%s): let no other run write here", folder, error.strerror)
        file.truncate(0)
        file.write(
            json.dumps({"host": platform.node(), "pid": os.getpid(), "since": time.ctime(), "command": command_line()})
        )
        file.flush()
        yield


def _holder(path: Path) -> str:
    try:
        said = json.loads(path.read_text(encoding="utf-8")[:10_000])
        return f"process {said['pid']} on {said['host']} since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said which"
