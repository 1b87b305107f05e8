"""Full checkpoints of a run on any number of ranks (torch 2.3 or newer), as checkpoint/layout.py lays them on disk.

Each rank writes the rows of the big tables (class centers, momentum) that it holds, and a share of what all ranks have
alike; N ranks write, M ranks read. All ranks succeed or fail together, with the same error.

Saving copies the state to the host and writes it beside the training; the checkpoint appears, whole, in one rename.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import layout
from runtime import host
from runtime.dist import ALONE, World
from runtime.errors import CheckpointError, DamagedCheckpoint
from runtime.shard import RowShard

log = logging.getLogger(__name__)


def available() -> bool:
    """Whether this torch can write and read sharded checkpoints."""
    return torch.distributed.is_available() and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 3)


def _check_available() -> None:
    if not available():
        raise CheckpointError(
            f"sharded checkpoints need torch 2.3 or newer with torch.distributed, this is {torch.__version__}: "
            "install one, or save .pth files"
        )


def _agree(world: World, error, value=None, what: str = "") -> list:
    """The values of all ranks; where a rank has an error, the first one's, raised on every rank."""
    told = None
    if error is not None:
        # Only what crosses to other processes: the class that decides what callers do, and the line.
        kind = type(error) if isinstance(error, CheckpointError) else CheckpointError
        line = str(error)
        if isinstance(error, OSError):
            line = (
                f"{what} (rank {world.rank}: {error.strerror or error}); earlier ones are untouched: "
                "free space or choose another folder"
            )
        told = (kind, line)
    answers = world.all_gather_object((told, value))
    for failed, _value in answers:
        if failed is not None:
            raise failed[0](failed[1]) from error
    return [value for _failed, value in answers]


# --- saving ----------------------------------------------------------------------------------------------------------


class Saver:
    """Saves checkpoints of one run into `folder`, which all ranks see and no other run writes to.

    keep: how many of the newest that it saved stay; `names` are those, and a resumed run puts its earlier ones there.
    background: copy the state to the host (as much memory again as this rank's share; where that is not free, it is
    written from where it is, a piece at a time, while the training waits) and write it while training goes on.
    published(path): called on rank 0, from the writing thread, with each new checkpoint.
    """

    def __init__(self, folder, world: World = ALONE, keep: int = 2, background: bool = True, published=None):
        _check_available()
        self.folder, self.world, self.keep = Path(folder), world, keep
        self.names: list = []
        self._published = published
        self._background = background
        self._thread = None
        self._error = None
        self._talk = world
        if world.is_main:
            layout.clear_left_over(self.folder)
        if background and world.size > 1:
            # The writing threads talk while the training ranks talk: on a group of its own, neither takes the
            # other's messages.
            self._talk = replace(world, host_group=torch.distributed.new_group(backend="gloo"))

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.wait()

    def save(self, name: str, state: dict, rows: dict, local=None) -> None:
        """Starts a checkpoint `{number}-{name}`; waits for the one before. Call it on all ranks.

        state: nested dicts and lists of tensors and plain values, the same on every rank.
        rows: name -> (tensor [shard.rows, ...], RowShard): this rank's rows of a table. The same names, trailing
        dimensions and totals on every rank. local: what only this rank has (generators), nested like state.
        Raises CheckpointError if the save before failed, or (not in the background) this one.
        """
        self.wait()
        rank, size = self.world.rank, self.world.size
        alike, own = {}, {}
        trees = layout.encode(state, "state", alike), layout.encode(local, f"rank{rank}", own)
        parts = {name: (tensor, RowShard.of(_rows(tensor))) for name, tensor in own.items()}
        for i, (key, tensor) in enumerate(alike.items()):
            if i % size == rank:  # the ranks share the writing of what they all have
                parts[key] = (tensor, RowShard.of(_rows(tensor)))
        for key, (tensor, shard) in rows.items():
            if len(tensor) != shard.rows:
                raise CheckpointError(f"rows of {key}: {len(tensor)} given, the shard has {shard.rows}")
            if shard.rows or shard.total == 0:
                parts[f"rows.{key}"] = (tensor.detach(), shard)
        if not (self._background and self._copy_fits(parts)):
            return self._write(name, trees, parts)
        parts = {key: (tensor.to("cpu", copy=True), shard) for key, (tensor, shard) in parts.items()}
        self._thread = threading.Thread(
            target=self._write_aside, args=(name, trees, parts), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _copy_fits(self, parts: dict) -> bool:
        need = sum(tensor.numel() * tensor.element_size() for tensor, _shard in parts.values())
        free = host.memory_left() // self.world.local_size
        if need > free:
            log.info("a copy of %.1f GB does not fit: the training waits for the checkpoint", need / 1e9)
        return need <= free

    def wait(self) -> None:
        """Until the last checkpoint is published. Raises CheckpointError if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_aside(self, name, trees, parts) -> None:
        try:
            self._write(name, trees, parts)
        except BaseException as error:  # handed to whoever waits
            self._error = error

    def _write(self, name: str, trees: tuple, parts: dict) -> None:
        start, world, what = time.monotonic(), self._talk, f"{self.folder}: checkpoint {name} not saved"
        made, error = (None, None), None
        try:
            if world.is_main:
                made = layout.begin(self.folder, name)
        except (CheckpointError, OSError) as failure:
            error = failure
        temporary, final = _agree(world, error, made, what)[0]
        try:
            try:
                written, error = self._write_parts(temporary, parts), None
            except (CheckpointError, OSError) as failure:
                written, error = None, failure
            answers = _agree(world, error, (written, trees[1]), what)
            try:
                if world.is_main:
                    tensors = {}
                    for written, _local in answers:
                        for key, stored in written.items():
                            tensors[key] = _joined(key, tensors.get(key), stored)
                    index = layout.Index(world.size, trees[0], [local for _written, local in answers], tensors)
                    layout.write_index(temporary, index)
                    layout.read_index(temporary)  # rows that no rank holds must fail now, not when they are needed
                    layout.publish(temporary, final)
            except (CheckpointError, OSError) as failure:
                error = failure
            _agree(world, error, None, what)
        except BaseException:
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.names.append(final.name)
        if world.is_main:
            log.info("saved %s in %.1f s", final, time.monotonic() - start)
            layout.prune(self.folder, self.keep, self.names)
            if self._published is not None:
                self._published(final)

    def _write_parts(self, temporary: Path, parts: dict) -> dict:
        """Writes this rank's file: name -> layout.Stored, with the pieces of this rank alone."""
        if not temporary.is_dir():
            raise CheckpointError(
                f"{temporary}: rank 0 made it, rank {self.world.rank} does not see it: use a shared folder"
            )
        written = {}
        with layout.RankFile(temporary, self.world.rank) as file:
            for name, (tensor, shard) in parts.items():
                shape = (shard.total, *tensor.shape[1:]) if tensor.dim() else ()
                stored = layout.Stored(str(tensor.dtype).split(".")[1], shape, [])
                for row, rows in layout.split_rows(shard.rows, stored.row_bytes):
                    stored.pieces.append(file.append(shard.start + row, tensor[row : row + rows] if shape else tensor))
                written[name] = stored
        return written


def _rows(tensor) -> int:
    return len(tensor) if tensor.dim() else 1


def _joined(name: str, one, other) -> layout.Stored:
    """The table of which two ranks wrote parts."""
    if one is None:
        return other
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        raise CheckpointError(
            f"{name}: {list(other.shape)} {other.dtype} on one rank, {list(one.shape)} {one.dtype} on another"
        )
    return replace(one, pieces=sorted([*one.pieces, *other.pieces], key=lambda piece: piece.row))


# --- loading ---------------------------------------------------------------------------------------------------------


def newest(folder) -> Path | None:
    """The newest whole checkpoint of `folder`, or None."""
    return layout.newest(folder)


def load(path, rows: dict, world: World = ALONE, check=None) -> tuple:
    """Reads the checkpoint directory `path` -> (state, local), both on cpu; fills `rows` in place. Call on all ranks.

    rows: name -> (tensor [shard.rows, ...], RowShard), a subset of those saved, on any device; floating point tensors
    may be of another floating point dtype than the saved ones. At most one piece (32 MiB) is held beside them.
    local: what this rank saved, or None if the checkpoint is of fewer ranks. check(path, state): raises CheckpointError
    for a state that this run has no use for, before a row is written.
    Raises CheckpointError, on all ranks, if any rank finds its part damaged (DamagedCheckpoint) or of another shape.
    No row is written before all ranks have found all of theirs whole: the files are read twice for that.
    """
    _check_available()
    path, reads, found, error = Path(path), [], (None, None), None
    try:
        index = layout.read_index(path)
        with layout.PieceReader(path) as reader:
            found = _small(reader, index, world.rank)
            if check is not None:
                check(path, found[0])
            for name, (tensor, shard) in rows.items():
                reads.append((_wanted(path, index, f"rows.{name}", tensor, shard), tensor.detach(), shard))
            for stored, _tensor, shard in reads:
                for piece in _overlapping(stored, shard):
                    reader.read(piece)
    except (CheckpointError, OSError) as failure:
        error = failure
    _agree(world, error, what=f"{path}: not read")
    try:
        with layout.PieceReader(path) as reader:
            for stored, tensor, shard in reads:
                _fill(reader, stored, tensor, shard)
    except (CheckpointError, OSError) as failure:  # no other checkpoint may follow: rows have been written
        error = CheckpointError(f"{path}: changed while it was read ({failure}): start again")
    _agree(world, error)
    return found


def _wanted(path, index, name: str, tensor, shard: RowShard) -> layout.Stored:
    stored = index.tensors.get(name)
    what = f"{path}: {name}"
    if stored is None:
        raise CheckpointError(f"{what} is not in this checkpoint: take one of a run with the same options")
    if stored.shape != (shard.total, *tensor.shape[1:]):
        raise CheckpointError(
            f"{what} is {list(stored.shape)}, this run wants {[shard.total, *tensor.shape[1:]]}: "
            "take a checkpoint of as many classes and of the same embedding size"
        )
    dtype = layout.DTYPES[stored.dtype][0]
    if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.dtype.is_floating_point):
        raise CheckpointError(f"{what} is {dtype}, this run wants {tensor.dtype}: choose the same dtype")
    return stored


def _overlapping(stored, shard: RowShard) -> list:
    return [piece for piece in stored.pieces if piece.row < shard.stop and piece.row + piece.rows > shard.start]


def piece_rows(reader, stored, piece):
    """The rows of a piece, [piece.rows, ...]; valid until the reader's next read."""
    shape = (piece.rows, *stored.shape[1:])
    dtype = layout.DTYPES[stored.dtype][0]
    return (
        torch.frombuffer(reader.read(piece), dtype=dtype).reshape(shape)
        if piece.bytes
        else torch.empty(shape, dtype=dtype)
    )


def _fill(reader, stored, tensor, shard: RowShard) -> None:
    """Reads rows [shard.start, shard.stop) of a table into `tensor`, piece by piece."""
    for piece in _overlapping(stored, shard):
        start, stop = max(piece.row, shard.start), min(piece.row + piece.rows, shard.stop)
        rows = piece_rows(reader, stored, piece)[start - piece.row : stop - piece.row]
        tensor[start - shard.start : stop - shard.start] = rows


def read_whole(reader, stored, target=None):
    """The whole tensor, into `target` of its shape if given."""
    if target is None:
        target = torch.empty(stored.shape, dtype=layout.DTYPES[stored.dtype][0])
    _fill(reader, stored, target if stored.shape else target.reshape(1), RowShard.of(stored.rows))
    return target


def _small(reader, index, rank: int) -> tuple:
    """(state, local) of this rank."""
    wanted = ("state", f"rank{rank}")
    tensors = {
        name: read_whole(reader, stored) for name, stored in index.tensors.items() if name.split(".")[0] in wanted
    }
    local = index.local[rank] if rank < index.world_size else None
    return layout.decode(index.values, tensors), layout.decode(local, tensors)


def load_newest(folder, rows: dict, world: World = ALONE, check=None):
    """load() of the newest checkpoint of `folder` that is whole: (path, state, local), or None if there is none at all.

    A damaged checkpoint is logged, and the one before it taken. Raises CheckpointError where one does not fit this run,
    and DamagedCheckpoint where there are some and all are damaged.
    """
    # One rank's list for all: what a rank sees of a shared folder may lag behind.
    paths = world.all_gather_object(layout.named(folder) if world.is_main else None)[0]
    for path in reversed(paths):
        try:
            return (path, *load(path, rows, world, check))
        except DamagedCheckpoint as error:
            log.warning("skipped %s", error)
    if paths:
        raise DamagedCheckpoint(f"{folder}: holds {len(paths)} checkpoint(s), and every one is damaged: move them away")
    return None


# --- when to save ----------------------------------------------------------------------------------------------------


class SaveEvery:
    """Says when a checkpoint is due: every `steps` steps, or when `minutes` have passed; neither: never.

    Ranks agree: minutes are asked of all of them, once in CHECK_STEPS steps because that is a collective.
    """

    CHECK_STEPS = 20

    def __init__(self, steps: int = 0, minutes: float = 0, world: World = ALONE, clock=time.monotonic):
        self._steps, self._seconds, self._world, self._clock = steps, 60 * minutes, world, clock
        self._last = clock()

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps (counted from 1, the same on all ranks)."""
        due = bool(self._steps) and step % self._steps == 0
        if self._seconds and step % self.CHECK_STEPS == 0:
            passed = torch.tensor(float(self._clock() - self._last >= self._seconds), device=self._world.device)
            due = bool(self._world.all_reduce_(passed, "max").item()) or due
        if due:
            self._last = self._clock()
        return due
