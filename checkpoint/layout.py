"""How a row-sharded checkpoint lies on disk: a directory of one file per rank and an index, readable by anyone.

    000012-step_3000/
        rank_00000.bin ...   tensors, piece after piece, each as torch.save writes it
        index.json           {"sha256", "index"}: plain values, and where the numbers of each piece lie
        .metadata, values.bin    the same for torch.distributed.checkpoint's own tools; never read here: it is a pickle

A piece is a run of whole rows (first dimension) of one tensor, at most PIECE_BYTES unless one row is longer, with the
SHA-256 of its numbers (little endian). Rows are numbered in the whole tensor, whichever rank held them: so any number
of ranks reads what any other number wrote, piece by piece. Nothing is unpickled, and nothing allocated before it is
known to be there.

The directory gets its name in one rename when everything in it has reached the disk: what has a name is whole. The
names count upwards, so the newest is the last, whatever clocks say.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pickle
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.errors import CheckpointError, DamagedCheckpoint
from runtime.files import atomic_file, checksum, sync, temporary_path

log = logging.getLogger(__name__)

FORMAT = "row-sharded checkpoint 2"
OLD_FORMAT = "row-sharded checkpoint 1"  # raw numbers without torch's wrapping, CRC-32, an index without a checksum
INDEX = "index.json"
VALUES = "values.bin"
MOST_INDEX_BYTES = 256 << 20  # that of a hundred million classes has 1 MiB
# index.json is this, byte for byte, around what the checksum is of
_AROUND = (b'{"sha256": "', b'", "index": ', b"}")
PIECE_BYTES = 32 << 20
MOST_RANKS = 99_999  # five digits in a file's name
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
_UNFINISHED = re.compile(r"\.\d{6,}-[\w.-]+\.tmp")
_TENSOR = re.compile(r"(state|rows|rank\d{1,9})(\..*)?", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """Rows [row, row + rows) of a tensor: `bytes` bytes of `file` from byte `start` on, after torch's wrapping.

    checksum: SHA-256, or the CRC-32 of the old format. blob: (start, length) with the wrapping; None in the old."""

    row: int
    rows: int
    file: str
    start: int
    bytes: int
    checksum: str | int
    blob: tuple | None = None


@dataclass(frozen=True)
class Stored:
    """A tensor [rows, ...], or a single number of shape [], and its pieces, in the order of their rows."""

    dtype: str
    shape: tuple
    pieces: list

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

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
        tensors[name] = value.detach()
        return {"tensor": name}
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
    "scalar": lambda name, tensors: tensors[name].reshape(()),  # the old format had none without dimensions
    "dict": lambda items, tensors: {key: decode(item, tensors) for key, item in items},
    "list": lambda items, tensors: [decode(item, tensors) for item in items],
    "tuple": lambda items, tensors: tuple(decode(item, tensors) for item in items),
}


# --- the index -------------------------------------------------------------------------------------------------------


def write_index(folder, index: Index) -> None:
    """Writes index.json, and beside it what torch's own tools read instead."""
    tensors = {
        name: {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "pieces": [[p.row, p.rows, p.file, p.start, p.bytes, p.checksum, p.blob] for p in stored.pieces],
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
    text = json.dumps(content).encode()
    _write_metadata(Path(folder), index)
    with atomic_file(Path(folder) / INDEX, CheckpointError) as file:
        file.write(_AROUND[0] + checksum(text).encode() + _AROUND[1] + text + _AROUND[2])


def read_index(path) -> Index:
    """Reads and checks the index of the checkpoint directory `path`: its files are there, and hold what it claims.

    Raises CheckpointError. The numbers themselves are checked when they are read.
    """
    path = Path(path)
    try:
        status = os.stat(path / INDEX)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_INDEX_BYTES:
            raise ValueError(f"no plain file of at most {MOST_INDEX_BYTES >> 20} MiB")
        text, known = _checked_text((path / INDEX).read_bytes())
        content = json.loads(text.decode())
        if content["format"] != known:
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
        raise DamagedCheckpoint(f"{path}: no whole checkpoint ({name} is missing): take another") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise DamagedCheckpoint(f"{path}: its {INDEX} is damaged ({error}): take another checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    return index


def _checked_text(data: bytes) -> tuple:
    """(the index's text, its format): every byte of the file is covered by the checksum, or is what it has to be."""
    if not data.startswith(_AROUND[0]):
        return data, OLD_FORMAT
    start = len(_AROUND[0]) + 64 + len(_AROUND[1])
    text = data[start : -len(_AROUND[2])]
    if data != _AROUND[0] + checksum(text).encode() + _AROUND[1] + text + _AROUND[2]:
        raise ValueError("it differs from its checksum")
    return text, FORMAT


def _stored(name: str, entry) -> Stored:
    if not _TENSOR.fullmatch(name):
        raise ValueError(f"tensor name {name[:40]!r}")
    shape = tuple(_count(n) for n in entry["shape"])
    pieces = []
    for row, rows, file, start, size, check, *blob in entry["pieces"]:
        if not _RANK_FILE.fullmatch(file):
            raise ValueError(f"file name {file!r}")
        if not (isinstance(check, str) and len(check) == 64):
            _count(check)
        pieces.append(Piece(_count(row), _count(rows), file, _count(start), _count(size), check, *blob))
    pieces.sort(key=lambda piece: piece.row)
    stored = Stored(entry["dtype"], shape, pieces)
    if stored.dtype not in DTYPES:
        raise ValueError(f"dtype {stored.dtype!r}")
    next_row = 0
    for piece in pieces:
        if piece.row != next_row or piece.bytes != piece.rows * stored.row_bytes:
            raise ValueError(f"row {next_row} of a tensor {list(shape)}")
        next_row += piece.rows
    if next_row != stored.rows:
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

    def append(self, row: int, tensor) -> Piece:
        """tensor: rows [row, row + len) on any device, or a number without dimensions."""
        blob, (start, size) = _as_torch_saves(tensor), (self._file.tell(), tensor.numel() * tensor.element_size())
        inside = _numbers_start(blob)
        self._file.write(blob)
        check = checksum(blob[inside : inside + size])
        return Piece(
            row, len(tensor) if tensor.dim() else 1, self.name, start + inside, size, check, (start, len(blob))
        )


def _as_torch_saves(value) -> memoryview:
    buffer = io.BytesIO()
    if isinstance(value, torch.Tensor):
        # a copy of its own: a view would bring the whole storage that it is of
        value = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    torch.save(value, buffer)
    return buffer.getbuffer()


def _numbers_start(blob: memoryview) -> int:
    """Where, in the zip file that torch.save makes of one tensor, its numbers begin."""
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
    # a local header is 30 bytes, a name and padding whose lengths are its last two numbers
    lengths = [
        int.from_bytes(blob[entry.header_offset + at : entry.header_offset + at + 2], "little") for at in (26, 28)
    ]
    return entry.header_offset + 30 + sum(lengths)


def _write_metadata(folder: Path, index: Index) -> None:
    """What torch.distributed.checkpoint.format_utils and its FileSystemReader need to read this checkpoint."""
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    entries, paths, stored_at = {}, {}, {}
    with atomic_file(folder / VALUES, CheckpointError) as file:

        def add(tree, path: tuple) -> None:
            kind, content = next(iter(tree.items())) if isinstance(tree, dict) else (None, None)
            if kind in ("tensor", "scalar"):
                add_tensor(content, path)
            elif '{"tensor": ' in (text := json.dumps(tree)) or '{"scalar": ' in text:
                for key, item in content if kind == "dict" else enumerate(content):
                    add(item, (*path, key))
            else:
                name, blob = ".".join(map(str, path)), _as_torch_saves(decode(tree, {}))
                entries[name], paths[name] = BytesStorageMetadata(), path
                stored_at[MetadataIndex(name)] = filesystem._StorageInfo(VALUES, file.tell(), len(blob))
                file.write(blob)

        def add_tensor(name: str, path: tuple) -> None:
            stored = index.tensors[name]
            dims, chunks = len(stored.shape), []
            for piece in stored.pieces:
                offsets = torch.Size((piece.row, *[0] * dims)[:dims])
                chunks.append(ChunkStorageMetadata(offsets, torch.Size((piece.rows, *stored.shape[1:])[:dims])))
                stored_at[MetadataIndex(name, offsets)] = filesystem._StorageInfo(piece.file, *piece.blob)
            properties = TensorProperties(dtype=DTYPES[stored.dtype][0])
            entries[name], paths[name] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks), path

        for name in index.tensors:
            if name.startswith("rows."):
                add_tensor(name, ("rows", name[len("rows.") :]))
        add(index.values, ("state",))
        for rank, tree in enumerate(index.local):
            add(tree, (f"rank{rank}",))
    with atomic_file(folder / ".metadata", CheckpointError) as file:
        pickle.dump(Metadata(entries, paths, stored_at), file)


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
        check = zlib.crc32(view) if isinstance(piece.checksum, int) else checksum(view)
        if done < piece.bytes or check != piece.checksum:
            raise DamagedCheckpoint(
                f"{self._path / piece.file}: damaged at byte {piece.start}: take another checkpoint, or copy it again"
            )
        return view


# --- a folder of checkpoints -----------------------------------------------------------------------------------------


def begin(folder, name: str) -> tuple:
    """(temporary directory, made; final path) for a new checkpoint `name` of letters, digits and `_.-`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{max(map(_number, named(folder)), default=0) + 1:06d}-{name}"
    if not _NAMED.fullmatch(final.name):
        raise CheckpointError(f"checkpoint name {name!r}: use letters, digits and _.-")
    temporary = temporary_path(final)
    temporary.mkdir()
    return temporary, final


def publish(temporary, final) -> None:
    """Gives a complete directory its name, after everything in it has reached the disk."""
    sync(temporary)
    os.rename(temporary, final)
    sync(Path(final).parent)


def named(folder) -> list:
    """The checkpoints of `folder` by their names, oldest first, whole or not."""
    return sorted(
        (path for path in Path(folder).glob("*-*") if _NAMED.fullmatch(path.name) and path.is_dir()), key=_number
    )


def _number(path: Path) -> int:
    return int(path.name.split("-")[0])


def newest_first(folder) -> Iterator[Path]:
    """The checkpoints of `folder` that are whole; damaged ones are logged and left out."""
    for path in reversed(named(folder)):
        try:
            read_index(path)
        except DamagedCheckpoint as error:
            log.warning("skipped %s", error)
        else:
            yield path


def newest(folder) -> Path | None:
    """The newest whole checkpoint of `folder`, or None."""
    return next(newest_first(folder), None)


def prune(folder, keep: int, names) -> None:
    """Of the checkpoints `names` of `folder` all go but the newest `keep` (at least one). Of two of one name, such as
    those of one step, the newer stays."""
    own = [path for path in named(folder) if path.name in names]
    newest = {path.name.split("-", 1)[1]: path for path in own}
    kept = sorted(newest.values(), key=_number)[-max(1, keep) :]
    for path in own:
        if path not in kept:
            doomed = temporary_path(path)
            os.rename(path, doomed)  # half a deleted checkpoint must not have a name
            shutil.rmtree(doomed)


def clear_left_over(folder) -> None:
    """Deletes what a killed run left unfinished in `folder`: for who knows that no other run writes there."""
    for path in Path(folder).glob(".*.tmp"):
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
