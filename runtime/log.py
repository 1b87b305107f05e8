"""What a run says: one error line for a command that fails, plain log lines, and numbers as JSON lines."""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

from runtime.address import without_passwords
from runtime.errors import ConfigError, UserError, printable

logger = logging.getLogger(__name__)


def one_line(error: BaseException | str) -> str:
    """The message of an error as one printable line of at most 300 characters; its class where it has none."""
    if isinstance(error, OSError) and error.strerror:  # without "[Errno 2]"
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        text = f"{names}: {error.strerror}" if names else error.strerror
    else:
        text = str(error)
    return printable(text) or type(error).__name__


class Parser(argparse.ArgumentParser):
    """A command's options. What is wrong with them is a ConfigError, one line, where argparse prints pages."""

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        for word in words:
            if word.partition("=")[2] == "--":  # which argparse takes for no value at all
                self.error(f"{word}: expected a value")
        if list(words).count("--") > 1:  # which argparse takes for a list
            self.error("-- stands twice")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        raise ConfigError(f"{message}: see --help")


def run_command(main) -> None:
    """Run a command's main() and leave the process with its status.

    What a user can cause (`runtime.errors.UserError`, and an OSError about a path they gave) ends as
    `error: <one line>` on stderr and status 1; any other exception keeps its traceback, because it is a bug of ours.
    Ctrl-C ends with 130, as in a shell."""
    try:
        status = main()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        status = 130
    except (UserError, OSError) as error:
        print(f"error: {without_passwords(one_line(error))}", file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.exit(status or 0)


def command_line(secret: str = "") -> str:
    """This process's command line for records, with `secret` (a store's password) and those in addresses struck out."""
    return shlex.join(["python", *(without_passwords(word, secret) for word in sys.argv)])


class _Formatter(logging.Formatter):
    def format(self, record) -> str:
        return without_passwords(super().format(record))


def setup_logging(rank: int = 0, size: int = 1, level: int = logging.INFO, stream=None) -> None:
    """Plain lines on stderr; with several ranks each line begins with the rank, and others than 0 only warn."""
    prefix = f"[rank {rank}] " if size > 1 else ""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter(prefix + "%(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level if rank == 0 else max(level, logging.WARNING))
    logging.getLogger("torch").setLevel(logging.WARNING)  # its process groups tell every step of their making


def run_folder(work_path, resumed: bool = False) -> Path:
    """Where a run's metrics go when nobody says: `work_path`/log, log_2, ...: the first without metrics of another
    run, or for a resumed run the last that has some."""
    taken, free = None, Path(work_path) / "log"
    number = 1
    while (free / "metrics.jsonl").exists():
        number += 1
        taken, free = free, Path(work_path) / f"log_{number}"
    return taken if resumed and taken is not None else free


class RunLog:
    """metrics.jsonl (and tensorboard's files beside it) of one run; writes on rank 0 only.

    folder: made if it does not exist; lines are appended, so a resumed run continues its file.
    config: plain values, written with the `run` line.
    """

    def __init__(self, folder, world, config: dict, tensorboard: bool = True):
        self.folder = Path(folder)
        self.world = world
        self.config = dict(config)
        self._file = self._board = None
        self._complained = False
        if not world.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        # of a run that was killed in the middle of a line: do not glue ours to it
        self._torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = open(path, "ab", buffering=0)
        if tensorboard:
            self._board = _summary_writer(self.folder / "tensorboard")

    def record(self, kind: str, **values) -> None:
        """Append one line {"kind", "time", ...values}. Values: plain numbers, strings, lists, dicts, and tensors or
        numpy arrays, which are fetched from their device here and only on rank 0. Not finite numbers become null.
        A `run` line gets world_size, config, versions and commit by itself."""
        if self._file is None:
            return
        line = {"kind": kind, "time": time.time()}
        if kind == "run":
            line.update(world_size=self.world.size, config=self.config, versions=versions(), commit=commit())
        line.update(values)
        self._write(json.dumps(plain(line), allow_nan=False) + "\n")

    def _write(self, line: str) -> None:
        """A disk that is full costs lines of the log, never the training."""
        data = (("\n" if self._torn else "") + line).encode()
        try:
            written = self._file.write(data)  # not buffered: what did not fit is not tried again with the next line
            problem = None if written == len(data) else "the disk is full"
        except OSError as error:
            written, problem = 0, error.strerror
        self._torn = 0 < written < len(data) or (self._torn and written == 0)
        self._complain(problem)

    def _complain(self, problem: str | None) -> None:
        if problem and not self._complained:
            logger.warning("%s: lines are lost (%s); the training goes on: free space", self.folder, problem)
        self._complained = self._complained or bool(problem)

    def scalar(self, name: str, value, step: int) -> None:
        if self._board is not None and math.isfinite(value):
            try:
                self._board.add_scalar(name, float(value), step)
            except OSError as error:
                self._complain(error.strerror)

    def figure(self, name: str, make, step: int) -> None:
        """make: returns a matplotlib figure; called only where there is a board to pin it on, and matplotlib."""
        if self._board is not None:
            try:
                self._board.add_figure(name, make(), step)
            except ImportError as error:
                logger.info("no picture of %s: %s", name, error)
            except OSError as error:
                self._complain(error.strerror)

    def close(self) -> None:
        for sink in (self._file, self._board):
            try:
                if sink is not None:
                    sink.close()
            except OSError as error:
                self._complain(error.strerror)
        self._file = self._board = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def plain(value):
    """value as JSON can hold it: tensors, arrays and paths converted, not finite numbers as None."""
    if hasattr(value, "tolist"):  # tensors, numpy arrays and numpy's scalars
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    return str(value)


def versions() -> dict:
    import numpy
    import torch

    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": numpy.__version__}


def commit() -> str | None:
    """The checkout's commit, with a + where files differ from it; None outside of git."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _summary_writer(folder: Path):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        logger.info("tensorboardX is not installed: scalars go to metrics.jsonl only")
        return None
    return SummaryWriter(str(folder))
