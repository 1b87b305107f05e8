"""MXNet RecordIO: the format of `train.rec` and `train.idx`.

A `.rec` is a sequence of parts: uint32 magic, uint32 lrec, payload, zeros up to 4 bytes; little endian. `lrec >> 29`
says whether the part is a whole record (0) or the first (1), middle (2) or last (3) of one that was split where its
payload held the magic word; the lower 29 bits are the length. A record's payload is IRHeader `<IfQQ` (flag, label,
id, id2), `flag` float32 labels, and the encoded image.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional, Union

import numpy as np

from data.dataset import MAX_CLASSES
from runtime.errors import DamagedItem, DataError
from runtime.files import open_regular, temporary_path

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_LENGTH_MASK = (1 << 29) - 1
MAX_EXACT_LABEL = 1 << 24  # a label is a float32
_MAX_LABELS = 4096  # of one record; the formats in use have one or two
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_INDEX_CHUNK = 8 << 20  # bytes of .idx parsed at a time
_GATHER_CHUNK = 1 << 15  # records looked at together: their indices take 8 bytes per byte read


def _aligned(offset: int) -> int:
    return offset + (-offset % 4)


def pack(label: Union[float, Sequence[float]], image: bytes = b"", key: int = 0) -> bytes:
    """A record's payload: IRHeader, labels, encoded image. A scalar goes into the header, a sequence after it."""
    if isinstance(label, (int, float, np.integer, np.floating)):
        labels = [label]
        head = _HEADER.pack(0, label, key, 0)
    else:
        labels = list(label)
        head = _HEADER.pack(len(labels), 0.0, key, 0) + struct.pack(f"<{len(labels)}f", *labels)
    for value in labels:
        if abs(value) > MAX_EXACT_LABEL:
            raise DataError(
                f"label {value:.0f}: RecordIO keeps labels as float32, exact up to {MAX_EXACT_LABEL}; "
                "use label.txt or base64 lists"
            )
    return head + image


def unpack(payload) -> tuple[tuple[float, ...], memoryview]:
    """(labels, encoded image) of a record's payload; DamagedItem if its header does not fit in it."""
    if len(payload) < _HEADER.size:
        raise DamagedItem(f"record of {len(payload)} bytes is shorter than its {_HEADER.size}-byte header")
    flag, label, _, _ = _HEADER.unpack_from(payload)
    start = _HEADER.size + 4 * flag
    if start > len(payload) or flag > _MAX_LABELS:
        raise DamagedItem(f"record of {len(payload)} bytes claims {flag} labels")
    labels = struct.unpack_from(f"<{flag}f", payload, _HEADER.size) if flag else (label,)
    return labels, memoryview(payload)[start:]


def to_class(label: float) -> int:
    """A label as a class; -1 for one that is no number of a class."""
    return int(label) if math.isfinite(label) and 0 <= label < MAX_CLASSES else -1


def _read_index(path: Path) -> tuple[Optional[np.ndarray], np.ndarray]:
    """(keys or None where they are 0, 1, 2 ..., offsets) sorted by key, both int64.

    Millions of lines: parsed in chunks into arrays of the final size, so that memory peaks near what is kept.
    """
    try:
        with open_regular(path) as file:
            lines = 0
            for chunk in iter(lambda: file.read(_INDEX_CHUNK), b""):
                lines += chunk.count(b"\n")
                tail = chunk
            if lines == 0 and file.tell() == 0:
                raise DataError(f"{path}: is empty: no image in this set")
            lines += not tail.endswith(b"\n")
            offsets, keys = np.empty(lines, np.int64), None
            file.seek(0)
            done = 0
            for chunk in iter(lambda: file.read(_INDEX_CHUNK) + file.readline(), b""):
                pairs = _parse_index_lines(chunk, path, done)
                stop = done + len(pairs)
                if keys is None and not np.array_equal(pairs[:, 0], np.arange(done, stop)):
                    keys = np.empty(lines, np.int64)
                    keys[:done] = np.arange(done)
                if keys is not None:
                    keys[done:stop] = pairs[:, 0]
                offsets[done:stop] = pairs[:, 1]
                done = stop
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if done == 0:
        raise DataError(f"{path}: is empty: no image in this set")
    offsets = offsets[:done]
    if keys is not None:
        order = np.argsort(keys[:done], kind="stable")
        keys, offsets = keys[order], offsets[order]
        twice = np.flatnonzero(keys[1:] == keys[:-1])
        if twice.size:
            raise DataError(f"{path}: key {keys[twice[0]]} occurs twice: write the index again")
        if keys[0] == 0 and keys[-1] == done - 1:
            keys = None
    if offsets.min() < 0 or keys is not None and keys[0] < 0:
        raise DataError(f"{path}: holds a negative number: write the index again")
    return keys, offsets


def _parse_index_lines(chunk: bytes, path: Path, lines_before: int) -> np.ndarray:
    """int64 [lines, 2]; blank lines are skipped. DataError names the first line that is not two numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # how numpy reports text that is not a number
        try:
            numbers = np.fromstring(chunk, dtype=np.int64, sep=" ")
        except (DeprecationWarning, ValueError):
            numbers = None
    rows = chunk.count(b"\n") + (not chunk.endswith(b"\n"))
    if numbers is not None and len(numbers) == 2 * rows:
        return numbers.reshape(-1, 2)
    good = []
    for number, line in enumerate(chunk.split(b"\n"), start=lines_before + 1):
        fields = line.split()
        if fields:
            if len(fields) != 2 or not all(field.isdigit() and len(field) < 19 for field in fields):
                raise DataError(f"{path} line {number}: {line[:40]!r} is not 'key<TAB>offset': write the index again")
            good.append([int(field) for field in fields])
    return np.array(good, np.int64).reshape(-1, 2)


class RecordIOReader:
    """Random access to the records of a `.rec` by key. Memory-mapped; may be forked and pickled.

    rec_path: the file of records. idx_path: its index; without one the records are found by reading through the file
    and get the keys 0, 1, 2 ...
    Raises DataError when the files do not fit each other: an index past the end, a cut-off file, a wrong magic word.
    """

    def __init__(self, rec_path, idx_path=None):
        self.path = Path(rec_path)
        self._map()
        if idx_path is None:
            self._keys, self._offsets = None, self._walk()
        else:
            self._keys, self._offsets = _read_index(Path(idx_path))
            self._check_index(Path(idx_path))

    def _map(self) -> None:
        try:
            with open_regular(self.path) as file:
                size = os.fstat(file.fileno()).st_size
                if size == 0:
                    raise DataError(f"{self.path}: is empty: no image in this set")
                self._mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):  # records are read in shuffled order: reading ahead would only cost
                self._mmap.madvise(mmap.MADV_RANDOM)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        self._size = size

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_mmap"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def keys(self) -> np.ndarray:
        """int64 [records], ascending."""
        return np.arange(len(self)) if self._keys is None else self._keys

    def __contains__(self, key: int) -> bool:
        return self._row(key) is not None

    def _row(self, key: int) -> Optional[int]:
        if self._keys is None:
            return key if 0 <= key < len(self._offsets) else None
        row = int(np.searchsorted(self._keys, key))
        return row if row < len(self._keys) and self._keys[row] == key else None

    def offset(self, key: int) -> int:
        """Byte offset of record `key`."""
        row = self._row(key)
        if row is None:
            raise DataError(f"{self.path}: has no record with key {key}")
        return int(self._offsets[row])

    def offsets(self, first: Optional[int] = None, stop: Optional[int] = None) -> np.ndarray:
        """int64: byte offsets in the order of keys; of the keys first .. stop-1 only, all of which must be there."""
        if first is None:
            return self._offsets
        if self._keys is None:
            begin, end = first, min(stop, len(self._offsets))
        else:
            begin, end = np.searchsorted(self._keys, [first, stop])
        if end - begin != stop - first:
            raise DataError(
                f"{self.path}: the index lacks some of the keys {first} to {stop - 1} which the header "
                "record announces: write the index again"
            )
        return self._offsets[begin:end]

    def read(self, key: int) -> bytes:
        """The payload of record `key`; DamagedItem if it is not whole, DataError if there is no such key."""
        try:
            return self.read_at(self.offset(key))
        except DamagedItem as error:
            raise DamagedItem(f"{self.path} key {key}: {error}") from None

    def read_at(self, offset: int) -> bytes:
        """The payload of the record at a byte offset; DamagedItem (which names the byte, not the file)."""
        cflag, start, stop = self._part(offset)
        if cflag == _WHOLE:
            return self._mmap[start:stop]
        if cflag != _FIRST:
            raise DamagedItem(f"byte {offset}: a split record begins in its middle")
        parts = [self._mmap[start:stop]]
        while cflag != _LAST:
            at = _aligned(stop)
            cflag, start, stop = self._part(at)
            if cflag not in (_MIDDLE, _LAST):
                raise DamagedItem(f"byte {at}: the split record of byte {offset} is not continued")
            parts.append(self._mmap[start:stop])
        return _MAGIC_BYTES.join(parts)

    def __iter__(self) -> Iterator[bytes]:
        """Payloads in the order of keys."""
        return (self.read_at(int(offset)) for offset in self._offsets)

    def _part(self, offset: int) -> tuple[int, int, int]:
        """(cflag, start, stop) of the part at `offset`."""
        if offset + _PART.size > self._size:
            raise DamagedItem(f"byte {offset}: past the end of the file ({self._size} bytes)")
        magic, lrec = _PART.unpack_from(self._mmap, offset)
        if magic != MAGIC:
            raise DamagedItem(f"byte {offset}: wrong magic 0x{magic:08X}, no record starts here")
        start = offset + _PART.size
        stop = start + (lrec & _LENGTH_MASK)
        if stop > self._size:
            raise DamagedItem(
                f"byte {offset}: cut off, the record ends {stop - self._size} bytes past the end of the file"
            )
        return lrec >> 29, start, stop

    def _walk(self) -> np.ndarray:
        offsets, offset = [], 0
        while offset < self._size:
            offsets.append(offset)
            try:
                cflag, _, stop = self._part(offset)
                while cflag in (_FIRST, _MIDDLE):
                    cflag, _, stop = self._part(_aligned(stop))
            except DamagedItem as error:
                raise DataError(f"{self.path} {error}: copy the file again") from None
            offset = _aligned(stop)
        return np.array(offsets, np.int64)

    def _check_index(self, idx_path: Path) -> None:
        first, last = int(np.argmin(self._offsets)), int(np.argmax(self._offsets))
        if int(self._offsets[last]) + _PART.size > self._size:
            raise DataError(
                f"{idx_path}: key {self.keys[last]} is at byte {self._offsets[last]}, past the end of "
                f"{self.path} ({self._size} bytes): the .rec is cut off or the index is another file's"
            )
        # A few records spread over the file tell a foreign index from the right one. One or two damaged records are
        # single images' damage, except the first (is it RecordIO at all?) and a last one that is not all there.
        looked_at = [first, *range(0, len(self), max(1, len(self) // 16)), last]
        problems = {}
        for row in looked_at:
            try:
                self._part(int(self._offsets[row]))
            except DamagedItem as error:
                problems[row] = error
        begins = int(self._offsets[last])
        cut_off = last in problems and self._mmap[begins : begins + 4] == _MAGIC_BYTES
        if first in problems or cut_off or len(problems) > len(set(looked_at)) / 2:
            error = problems[first if first in problems else last if cut_off else min(problems)]
            raise DataError(
                f"{self.path} {error}: the .rec is damaged or cut off, or {idx_path.name} belongs to another file"
            )

    def gather(self, offsets: np.ndarray, count: int) -> np.ndarray:
        """uint8 [len(offsets), count]: the first bytes at each offset, zeros past the end of the file."""
        data = np.frombuffer(self._mmap, np.uint8)
        out = np.empty((len(offsets), count), np.uint8)
        for begin in range(0, len(offsets), _GATHER_CHUNK):
            where = offsets[begin : begin + _GATHER_CHUNK, None] + np.arange(count)
            chunk = data[np.minimum(where, self._size - 1)]
            chunk[where >= self._size] = 0
            out[begin : begin + _GATHER_CHUNK] = chunk
        return out

    def first_labels(self, offsets: np.ndarray) -> np.ndarray:
        """int64: the class of the records at these offsets, from their headers alone; -1 where one cannot be read."""
        words = self.gather(offsets, _PART.size + _HEADER.size + 4)
        numbers, floats = words.view("<u4"), words.view("<f4")
        flag, length = numbers[:, 2], numbers[:, 1] & _LENGTH_MASK
        values = np.where(flag > 0, floats[:, 8], floats[:, 3])
        whole = (numbers[:, 0] == MAGIC) & (numbers[:, 1] >> 29 == _WHOLE) & (length >= _HEADER.size + 4 * (flag > 0))
        labels = np.full(len(offsets), -1, np.int64)
        usable = whole & (values >= 0) & (values < MAX_CLASSES)  # not for nan
        labels[usable] = values[usable].astype(np.int64)
        for row in np.flatnonzero(~whole):
            try:  # a split record's labels may lie in its second part
                labels[row] = to_class(unpack(self.read_at(int(offsets[row])))[0][0])
            except DamagedItem:
                pass
        return labels

    def label_pairs(self, offsets: np.ndarray) -> Optional[np.ndarray]:
        """float32 [records, 2]: the labels of records that have two; None if one has not."""
        raw = self.gather(offsets, _PART.size + _HEADER.size + 8)
        whole_with_two = raw.view("<u4")[:, [0, 2]] == (MAGIC, 2)
        return raw.view("<f4")[:, 8:10] if whole_with_two.all() else None


class RecordIOWriter:
    """Writes a `.rec` and its `.idx`; both appear under their names only when closed without an error.

    with RecordIOWriter("train.rec", "train.idx") as writer: writer.write(0, pack([1, 2]))
    """

    def __init__(self, rec_path, idx_path):
        self._paths = [Path(rec_path), Path(idx_path)]
        self._partial = [temporary_path(path) for path in self._paths]
        for path in self._paths:
            if path.exists() and not path.is_file():  # a rename would replace a device by a file
                raise DataError(f"{path}: not written (it is there and is no file): choose another name")
        self._rec = open(self._partial[0], "xb")
        self._idx = open(self._partial[1], "x", encoding="ascii", newline="\n")

    def write(self, key: int, payload: bytes) -> None:
        """Append one record. Payloads of 2^29 bytes and more do not fit the format: DataError."""
        if len(payload) > _LENGTH_MASK:
            raise DataError(f"record {key}: {len(payload)} bytes, RecordIO holds at most {_LENGTH_MASK}")
        self._idx.write(f"{key}\t{self._rec.tell()}\n")
        pieces = _split_at_magic(payload)
        for number, piece in enumerate(pieces):
            if len(pieces) == 1:
                cflag = _WHOLE
            else:
                cflag = _FIRST if number == 0 else _LAST if number == len(pieces) - 1 else _MIDDLE
            self._rec.write(_PART.pack(MAGIC, cflag << 29 | len(piece)))
            self._rec.write(piece)
            self._rec.write(bytes(-len(piece) % 4))

    def close(self) -> None:
        """Finish both files and give them their names."""
        for file in (self._rec, self._idx):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for partial, path in zip(self._partial, self._paths):
            os.replace(partial, path)

    def __enter__(self) -> RecordIOWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
            return
        self._rec.close()
        self._idx.close()
        for partial in self._partial:
            partial.unlink()


def _split_at_magic(payload: bytes) -> list[bytes]:
    """The payload cut at every magic word on a 4-byte boundary (the words themselves are left out)."""
    pieces, begin = [], 0
    at = payload.find(_MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            pieces.append(payload[begin:at])
            begin = at + 4
            at = payload.find(_MAGIC_BYTES, begin)
        else:
            at = payload.find(_MAGIC_BYTES, at + 1)
    return [*pieces, payload[begin:]]
