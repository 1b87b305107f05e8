"""How a row-sharded checkpoint lies on disk: a directory of one raw file per rank and an index, readable by anyone.

    000012-step_3000/
        rank_00000.bin ...   the numbers of tensors, little endian, piece after piece; nothing else
        index.json           {"format", "world_size", "values", "local", "tensors"}: plain values, and where pieces lie

A piece is a run of whole rows (first dimension) of one tensor, at most PIECE_BYTES unless one row is longer, with its
CRC-32. Rows are numbered in the whole tensor, whichever rank held them: so any number of ranks reads what any other
number wrote, piece by piece. There is no pickle anywhere, and nothing is allocated before it is known to be there.

The directory gets its name in one rename when everything in it has reached the disk: what has a name is whole. The
names count upwards, so the newest is the last, whatever clocks say.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.errors import CheckpointError
from runtime.files import atomic_file, sync_folder

log = logging.getLogger(__name__)

FORMAT = "row-sharded checkpoint 1"
INDEX = "index.json"
PIECE_BYTES = 32 << 20
DTYPES = {
    str(dtype).split(".")[1]: (dtype, size)
    for dtype, size in {
        torch.float32: 4,
        torch.float64: 8,
        torch.float16: 2,
        torch.bfloat16: 2,
        torch.int64: 8,
        torch.int32: 4,
        torch.int16: 2,
        torch.int8: 1,
        torch.uint8: 1,
        torch.bool: 1,
    }.items()
}
_RANK_FILE = re.compile(r"rank_\d{5}\.bin")
_NAMED = re.compile(r"(\d{6,})-[\w.-]+")
_TENSOR = re.compile(r"(state|rows|rank\d{1,9})(\..*)?", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """Rows [row, row + rows) of a tensor: `bytes` bytes of `file` from byte `start` on."""

    row: int
    rows: int
    file: str
    start: int
    bytes: int
    crc32: int


@dataclass(frozen=True)
class Stored:
    """A tensor [rows, ...] and its pieces, in the order of their rows."""

    dtype: str
    shape: tuple
    pieces: list

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds. values, local (one per rank): trees made by encode()."""

    world_size: int
    values: object
    local: list
    tensors: dict


def split_rows(rows: int, row_bytes: int) -> list:
    """[(first row, rows)] of pieces of at most PIECE_BYTES; one empty piece for no rows."""
    most = max(1, PIECE_BYTES // max(1, row_bytes))
    return [(row, min(most, rows - row)) for row in range(0, rows, most)] or [(0, 0)]


# --- trees of plain values, tensors by name --------------------------------------------------------------------------


def encode(value, name: str, tensors: dict):
    """The nested dicts, lists and tuples of `value` as JSON; its tensors go into `tensors` as name.key.key..."""
    if isinstance(value, torch.Tensor):
        if str(value.dtype).split(".")[1] not in DTYPES:
            raise CheckpointError(f"{name}: {value.dtype} cannot go into a checkpoint: convert it")
        if name in tensors:
            raise CheckpointError(f"{name}: two tensors of this name: rename one")
        tensors[name] = value.detach().reshape(1) if value.dim() == 0 else value.detach()
        return {"scalar" if value.dim() == 0 else "tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_plain(key, name), encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [encode(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    return _plain(value, name)


def _plain(value, name: str):
    if type(value) not in (str, int, float, bool, type(None)):
        raise CheckpointError(f"{name}: a {type(value).__name__} cannot go into a checkpoint: store a plain value")
    return value


def decode(tree, tensors: dict):
    """What encode() was given, with tensors taken from `tensors`."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    return _DECODE[kind](content, tensors)


_DECODE = {
    "tensor": lambda name, tensors: tensors[name],
    "scalar": lambda name, tensors: tensors[name].reshape(()),
    "dict": lambda items, tensors: {key: decode(item, tensors) for key, item in items},
    "list": lambda items, tensors: [decode(item, tensors) for item in items],
    "tuple": lambda items, tensors: tuple(decode(item, tensors) for item in items),
}


# --- the index -------------------------------------------------------------------------------------------------------


def write_index(folder, index: Index) -> None:
    tensors = {
        name: {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "pieces": [[p.row, p.rows, p.file, p.start, p.bytes, p.crc32] for p in stored.pieces],
        }
        for name, stored in index.tensors.items()
    }
    content = {
        "format": FORMAT,
        "world_size": index.world_size,
        "values": index.values,
        "local": index.local,
        "tensors": tensors,
    }
    with atomic_file(Path(folder) / INDEX, CheckpointError) as file:
        file.write(json.dumps(content).encode())


def read_index(path) -> Index:
    """Reads and checks the index of the checkpoint directory `path`: its files are there, and hold what it claims.

    Raises CheckpointError. The numbers themselves are checked when they are read.
    """
    path = Path(path)
    try:
        content = json.loads((path / INDEX).read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} is not known here")
        tensors = {name: _stored(name, entry) for name, entry in content["tensors"].items()}
        index = Index(int(content["world_size"]), content["values"], list(content["local"]), tensors)
        if len(index.local) != index.world_size:
            raise ValueError(f"{len(index.local)} local states of {index.world_size} ranks")
        shapes = {name: torch.zeros(()).expand(stored.shape) for name, stored in tensors.items()}
        for tree in [index.values, *index.local]:
            decode(tree, shapes)
        _check_files(path, tensors)
    except (FileNotFoundError, NotADirectoryError) as error:
        name = Path(error.filename).name
        raise CheckpointError(f"{path}: no whole checkpoint ({name} is missing): take another") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        message = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: its {INDEX} is damaged ({message}): take another checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    return index


def _stored(name: str, entry) -> Stored:
    if not _TENSOR.fullmatch(name):
        raise ValueError(f"tensor name {name[:40]!r}")
    shape = tuple(_count(n) for n in entry["shape"])
    pieces = []
    for row, rows, file, start, size, crc32 in entry["pieces"]:
        if not _RANK_FILE.fullmatch(file):
            raise ValueError(f"file name {file!r}")
        pieces.append(Piece(_count(row), _count(rows), file, _count(start), _count(size), _count(crc32)))
    pieces.sort(key=lambda piece: piece.row)
    stored = Stored(entry["dtype"], shape, pieces)
    if stored.dtype not in DTYPES:
        raise ValueError(f"dtype {stored.dtype!r}")
    next_row = 0
    for piece in pieces:
        if piece.row != next_row or piece.bytes != piece.rows * stored.row_bytes:
            raise ValueError(f"row {next_row} of a tensor {list(shape)}")
        next_row += piece.rows
    if not shape or next_row != shape[0]:
        raise ValueError(f"{next_row} rows of a tensor {list(shape)}")
    return stored


def _count(value) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _check_files(path: Path, tensors: dict) -> None:
    # No byte belongs to two pieces, so all tensors together cannot claim more memory than there is file.
    by_file = {}
    for stored in tensors.values():
        for piece in stored.pieces:
            by_file.setdefault(piece.file, []).append((piece.start, piece.start + piece.bytes))
    for name, spans in by_file.items():
        status = os.lstat(path / name)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name} is not a plain file")
        spans.sort()
        end = 0
        for start, stop in spans:
            if start < end:
                raise ValueError(f"two pieces share byte {start} of {name}")
            end = stop
        if end > status.st_size:
            raise ValueError(f"{name} has {status.st_size} bytes of {end}")


# --- the numbers -----------------------------------------------------------------------------------------------------


class RankFile:
    """Writes pieces to one rank's file; the file is on the disk when the block ends without an error."""

    def __init__(self, folder, rank: int):
        self.name = f"rank_{rank:05d}.bin"
        self._path = Path(folder) / self.name

    def __enter__(self) -> RankFile:
        self._file = open(self._path, "wb")
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def append(self, row: int, rows: int, data) -> Piece:
        """data: the bytes of rows [row, row + rows)."""
        start = self._file.tell()
        self._file.write(data)
        return Piece(row, rows, self.name, start, len(data), zlib.crc32(data))


class PieceReader:
    """Reads pieces of one checkpoint into one buffer that it keeps, and compares them with their checksums."""

    def __init__(self, path):
        self._path = Path(path)
        self._files = {}
        self._buffer = bytearray()

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *_error) -> None:
        for file in self._files.values():
            file.close()

    def read(self, piece: Piece) -> memoryview:
        """The bytes of a piece; valid until the next read()."""
        if piece.file not in self._files:
            self._files[piece.file] = open(self._path / piece.file, "rb", buffering=0)
        if len(self._buffer) < piece.bytes:
            self._buffer = bytearray(piece.bytes)
        view = memoryview(self._buffer)[: piece.bytes]
        file, done = self._files[piece.file], 0
        file.seek(piece.start)
        while done < piece.bytes:
            count = file.readinto(view[done:])
            if not count:
                break
            done += count
        if done < piece.bytes or zlib.crc32(view) != piece.crc32:
            raise CheckpointError(
                f"{self._path / piece.file}: damaged at byte {piece.start}: take another checkpoint, or copy it again"
            )
        return view


# --- a folder of checkpoints -----------------------------------------------------------------------------------------


def begin(folder, name: str) -> tuple:
    """(temporary directory, made; final path) for a new checkpoint `name` of letters, digits and `_.-`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".*.tmp"):  # of a killed run, or of a prune that was cut short
        shutil.rmtree(left_over, ignore_errors=True)
    numbered = [int(path.name.split("-")[0]) for path in _named(folder)]
    final = folder / f"{max(numbered, default=0) + 1:06d}-{name}"
    if not _NAMED.fullmatch(final.name):
        raise CheckpointError(f"checkpoint name {name!r}: use letters, digits and _.-")
    temporary = folder / f".{final.name}.tmp"
    temporary.mkdir()
    return temporary, final


def publish(temporary, final) -> None:
    """Gives a complete directory its name, after everything in it has reached the disk."""
    sync_folder(temporary)
    os.rename(temporary, final)
    sync_folder(Path(final).parent)


def _named(folder) -> list:
    found = [path for path in Path(folder).glob("*-*") if _NAMED.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[0]))


def newest_first(folder) -> Iterator[Path]:
    """The checkpoints of `folder` that are whole; damaged ones are logged and left out."""
    for path in reversed(_named(folder)):
        try:
            read_index(path)
        except CheckpointError as error:
            log.warning("skipped %s", error)
        else:
            yield path


def newest(folder) -> Path | None:
    """The newest whole checkpoint of `folder`, or None."""
    return next(newest_first(folder), None)


def prune(folder, keep: int) -> None:
    """Deletes all but the newest `keep` (at least one) checkpoints of `folder`."""
    for path in _named(folder)[: -max(1, keep)]:
        doomed = path.with_name(f".{path.name}.tmp")
        os.rename(path, doomed)  # half a deleted checkpoint must not have a name
        shutil.rmtree(doomed)
