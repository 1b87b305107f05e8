"""`.pth` files: written so that a crash never leaves half of one, read as untrusted.

A file of ours is a dict of tensors and plain Python values, in the schema `model head optimizer epoch config` plus
`meta` (what the network is) and `training` (what a resumed run needs), so `torch.load(weights_only=True)` reads it.

Reading takes two passes. The first (safe_pickle) refuses whatever is not a tensor or plain data, and sizes that the
file does not hold; nothing of the file has run or been allocated by then, and the verdict is the same under every
torch. The second pass is torch's own loader. What it has read is held against the file's own checksum (content).
"""

from __future__ import annotations

import copy
import logging
import os
import re
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint import content, safe_pickle
from runtime.errors import CheckpointError, DamagedCheckpoint
from runtime.files import atomic_file, left_over

log = logging.getLogger(__name__)

TIME = "%Y-%m-%d-%H-%M"
NAME = re.compile(r"model_(?P<time>\d{4}(?:-\d{2}){4})_epoch:(?P<epoch>\d+)_(?P<accuracy>\d+\.\d{5})\.pth")


# --- writing ---------------------------------------------------------------------------------------------------------


def save_pth(path, state: dict) -> None:
    """Writes `state` (tensors and plain values) to `path` atomically: the file is the old one or the whole new one.

    Raises CheckpointError for a value that is neither tensor nor plain, and when the disk refuses; the temporary file
    is gone then and an older file of that name untouched.
    """
    _check_plain(state, "")
    with atomic_file(path, CheckpointError) as file:
        quiet = _QuietFile(file)
        torch.save(content.with_checksum(_on_host(state)), quiet)
        if quiet.error is not None:
            raise quiet.error


class _QuietFile:
    """Keeps the first write error for later instead of raising it.

    torch's zip writer finishes the archive in its destructor; an exception out of `write` there ends the process.
    """

    def __init__(self, raw):
        self._raw = raw
        self.error = None

    def write(self, data) -> int:
        if self.error is None:
            try:
                return self._raw.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._raw.flush()
            except OSError as error:
                self.error = error


def _check_plain(value, place: str) -> None:
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int, float, bool):
                raise CheckpointError(f"{place or 'checkpoint'}: key {key!r} is a {type(key).__name__}: use str or int")
            _check_plain(item, f"{place}.{key}" if place else str(key))
    elif kind in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif kind in (torch.Tensor, torch.nn.Parameter):
        if any(step == 0 and size > 1 for size, step in zip(value.shape, value.stride())):
            raise CheckpointError(f"{place}: an expanded tensor holds fewer numbers than it claims: save .contiguous()")
    elif kind not in (str, int, float, bool, type(None)):
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise CheckpointError(f"{place}: {name} cannot go into a checkpoint: store tensors and plain values")


def _on_host(value):
    """The same with every tensor in host memory: a file that names its device is not read where there is none."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        host = copy.copy(value)  # with the _metadata that a module's state dict carries
        host.update((key, _on_host(item)) for key, item in value.items())
        return host
    if kind in (list, tuple):
        return kind(_on_host(item) for item in value)
    return value.cpu() if isinstance(value, torch.Tensor) else value


# --- reading ---------------------------------------------------------------------------------------------------------


def load_pth(path, map_location="cpu") -> Any:
    """Reads tensors and plain data from `path`, written by any torch since 1.0; runs nothing that it brings along.

    Raises CheckpointError (one line: file, cause, cure) for a missing or unreadable file, and DamagedCheckpoint for a
    cut-off, damaged, foreign or hostile one.
    """
    path = Path(path)
    with _explained(path), open(path, "rb") as file:
        names = safe_pickle.inspect(file)
        file.seek(0)
        if names & set(safe_pickle.UPSTREAM_CONFIG):
            log.info("%s: of its config only plain values and paths are read", path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the source code of the classes that stand-ins replace
            state = torch.load(file, map_location=map_location, **safe_pickle.loader(names))
    return content.verified(state, path)


@contextmanager
def _explained(path):
    """Whatever reading raises becomes one CheckpointError line about `path`."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is a folder or no plain file: pass a .pth file")
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint: check the path") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}): check the path") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: does not fit into memory: use a machine with more") from error
    except (EOFError, safe_pickle.CutOff) as error:
        raise DamagedCheckpoint(
            f"{path}: cut off or damaged ({error or 'ends too early'}): copy it again or take an older one"
        ) from error
    except Exception as error:
        # A hostile file can make an unpickler raise anything at all; none of it is a fault of the caller.
        raise DamagedCheckpoint(
            f"{path}: not a checkpoint that can be read safely ({error}): use one that holds only tensors and plain "
            "values"
        ) from error


# --- what a checkpoint is of -----------------------------------------------------------------------------------------

ARCHITECTURE = ("net_mode", "net_depth", "embedding_size")


def check_architecture(saved_meta: dict, wanted: dict, path="checkpoint") -> None:
    """Raises CheckpointError unless the net in `saved_meta["architecture"]` and its class count are those in `wanted`.

    saved_meta: the checkpoint's `meta`. wanted: any of net_mode, net_depth, embedding_size, num_classes; what either
    side does not state is not compared.
    """
    saved = {**saved_meta, **(saved_meta.get("architecture") or {})}

    def differ(name):
        return None not in (saved.get(name), wanted.get(name)) and saved[name] != wanted[name]

    if any(differ(name) for name in ARCHITECTURE):
        known = [name for name in ARCHITECTURE if saved.get(name) is not None]
        raise CheckpointError(
            f"{path}: holds {' '.join(f'{name} {saved[name]}' for name in known)}, "
            f"this run wants {' '.join(f'{name} {wanted.get(name)}' for name in known)}: "
            f"pass {' '.join(f'--{name}={saved[name]}' for name in known if differ(name))} or another checkpoint"
        )
    if differ("num_classes"):
        raise CheckpointError(
            f"{path}: has {saved['num_classes']} classes, the data {wanted['num_classes']}: "
            "pass --is_finetune to keep the backbone and start a new head, or the data that it was trained on"
        )


# --- the folder of checkpoints ---------------------------------------------------------------------------------------


class Saved(NamedTuple):
    time: str
    epoch: int
    accuracy: float
    path: Path


def checkpoint_name(time: str, epoch: int, accuracy: float) -> str:
    """`model_2026-11-20-16-05_epoch:3_0.99817.pth`; time as year-month-day-hour-minute, accuracy a fraction."""
    return f"model_{time}_epoch:{epoch}_{accuracy:.5f}.pth"


def next_path(folder, epoch: int, accuracy: float, own) -> Path:
    """Where the next checkpoint goes: by its name newer than every other there, whatever the clock says, and no file of
    another run (whose name is not in `own`) is at that place."""
    now = datetime.now().strftime(TIME)
    when = max([now, *(saved.time for saved in list_saved(folder))])
    while True:
        path = Path(folder) / checkpoint_name(when, epoch, accuracy)
        if path.name in own or not path.exists():
            return path
        when = (datetime.strptime(when, TIME) + timedelta(minutes=1)).strftime(TIME)


def keep_newest(path) -> None:
    """Makes `path`, just written, the newest of its folder by its time too, which tells names of one minute apart."""
    others = [saved.path.stat().st_mtime_ns for saved in list_saved(path.parent) if saved.path != path]
    if others and max(others) >= path.stat().st_mtime_ns:  # the clock was put back
        os.utime(path, ns=(max(others) + 1,) * 2)


def list_saved(folder) -> list[Saved]:
    """The checkpoints of `folder` by their names, oldest first; other files do not count."""
    found = []
    for path in Path(folder).glob("model_*.pth"):
        match = NAME.fullmatch(path.name)
        if match:
            found.append(Saved(match["time"], int(match["epoch"]), float(match["accuracy"]), path))
    # The name's time has minutes only; several saves of one minute are told apart by when they were written.
    return sorted(found, key=lambda saved: (saved.time, saved.path.stat().st_mtime_ns, saved.epoch))


def newest(folder) -> Path | None:
    """The newest checkpoint of `folder` that is whole, or None."""
    for saved in reversed(list_saved(folder)):
        try:
            with _explained(saved.path), open(saved.path, "rb") as file:
                safe_pickle.inspect(file)
        except DamagedCheckpoint as error:
            log.warning("skipped %s", error)
        else:
            return saved.path
    return None


def prune(folder, keep: int = 0, names=None) -> list[Path]:
    """Deletes old checkpoints and returns them: the best by accuracy, the newest and `keep` more of the newest stay.

    names: of the files that may go; all if None. Temporary files that a killed process left behind go too.
    """
    saved = [one for one in list_saved(folder) if names is None or one.path.name in names]
    if saved:
        best = max(saved, key=lambda one: one.accuracy)
        deleted = [one.path for one in saved[:-1] if one is not best]
        deleted = deleted[: len(deleted) - keep] if keep else deleted
    else:
        deleted = []
    deleted += left_over(folder, "model_*.pth*")
    for path in deleted:
        path.unlink()
    return deleted
