"""A global shuffle of a base64 list in bounded memory, for sets that are larger than it.

Every line gets a random 64-bit key; the output is the lines in the order of their keys. First pass: pieces of the
input, on all cores, are divided into buckets by the key's leading bits. Second pass: each bucket, which fits into
memory, is sorted by key and written to its place. A key depends on the seed and on where the line stands, so that the
result is the same whatever the memory and the number of processes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import shutil
import struct
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from data.base64_reader import label_comes_first, read_file_list
from data.parallel import processes, spread
from runtime.errors import DataError

MEMORY = 1 << 30
_MOST_RANKS = 1 << 16
_PIECES_A_WORKER = 3  # what a process holds of a piece or a bucket: its bytes, those in order, and where lines are
_MAX_LINE = 64 << 20
_MAX_DIGITS = 18  # of a label
_AT_ONCE = 1024  # parts that one write takes, as systems bound it
_IN_CACHE = 1 << 17
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_HEAD = "<qq"  # lines and bytes of them that a piece adds to a bucket
_ENTRY = np.dtype([("key", "<u8"), ("length", "<u4")])  # of a line; packed, 12 bytes
_SCRATCH = ".process_base64_files"


class _Piece(NamedTuple):
    """A range of bytes of an input part: it owns the lines that begin in it."""

    number: int
    part: int
    path: Path
    start: int
    stop: int


class _Slice(NamedTuple):
    """Lines [start, stop) of a bucket in the order of keys, which belong into an output part at a byte offset."""

    start: int
    stop: int
    part: int
    offset: int


def shuffle(
    data_dir, file_list: str, nranks: int, seed: int = 0, memory: int = MEMORY, workers: Optional[int] = None
) -> list[Path]:
    """Shuffles the set that `data_dir/file_list` names into `nranks` files of equally many lines; their paths.

    They are called base64_rank_0 ... (with a number behind, where such files are there already); the file list names
    them in the end, and the old list stays as `<file_list>.before`. The input's parts stay as they are. The shortfall
    of the last file is made up of lines drawn at random from the whole set. memory: bytes that all processes together
    hold of the set. Raises DataError, and leaves everything as it was, for a line that is not base64 and a label, a
    part that is missing, an empty set, and too small a disk.
    """
    root, list_path = Path(data_dir), Path(data_dir) / file_list
    if not 1 <= nranks <= _MOST_RANKS:
        raise DataError(f"--nranks {nranks}: from 1 to {_MOST_RANKS}, the number of devices that will train")
    if Path(file_list).name != file_list:
        raise DataError(f"--file_list {file_list}: give the name of a file in --data_dir, without a folder")
    parts = read_file_list(list_path)
    label_first = label_comes_first(parts[0])
    total = sum(part.stat().st_size for part in parts)
    free = shutil.disk_usage(root).free
    if 2 * total > free:
        raise DataError(
            f"{root}: shuffling {total / 1e9:.2f} GB needs twice as much of the disk, and {free / 1e9:.2f} GB are free"
        )
    workers = processes(workers)
    if 2 * total <= memory:
        with _scratch(root) as scratch:
            return _publish(root, list_path, _write_at_once(scratch, parts, nranks, seed, label_first, workers))
    unit = max(1, memory // (_PIECES_A_WORKER * workers))
    with _scratch(root) as scratch:
        buckets = -(-total // unit)
        jobs = _pieces(parts, unit)
        divide = partial(_divide, folder=scratch, buckets=buckets, seed=seed, label_first=label_first)
        lines, sizes = np.zeros(buckets, np.int64), np.zeros(buckets, np.int64)
        for more, longer in spread(divide, jobs, workers, "reading", "B", lambda piece: piece.stop - piece.start):
            lines += more
            sizes += longer
        made = _write(scratch, lines.tolist(), sizes.tolist(), nranks, seed, workers)
        return _publish(root, list_path, made)


def _pieces(parts: list[Path], unit: int) -> list[_Piece]:
    places = [
        (number, path, start, min(start + unit, path.stat().st_size))
        for number, path in enumerate(parts)
        for start in range(0, path.stat().st_size, unit)
    ]
    return [_Piece(number, *place) for number, place in enumerate(places)]


# --- first pass -------------------------------------------------------------------------------------------------------


class _Lines(NamedTuple):
    """Lines as `base64<TAB>label<NEWLINE>` in `text`; a blank one has no length."""

    text: memoryview
    starts: np.ndarray  # int64, bytes of text
    lengths: np.ndarray  # int64
    keys: np.ndarray  # uint64


def _divide(piece: _Piece, folder: Path, buckets: int, seed: int, label_first: bool) -> tuple[np.ndarray, np.ndarray]:
    """Appends the piece's lines to the buckets' files in `folder`: for each bucket how many lines and bytes, the lines'
    keys and lengths, the lines. Returns how many lines, and how many bytes of them, went into each bucket."""
    text, starts, lengths, keys = _keyed(piece, seed, label_first, partial(_reused, "in"))
    order = np.argsort(keys, kind="stable")
    order = order[lengths[order] > 0]
    keys, starts, lengths = keys[order], starts[order], lengths[order]
    # exact whole numbers: a bucket is [bucket, bucket + 1) * 2^64 / buckets
    edges = np.array([-(-(bucket << 64) // buckets) for bucket in range(1, buckets)], np.uint64)
    firsts = np.array([0, *np.searchsorted(keys, edges), len(keys)])
    places = np.concatenate([[0], np.cumsum(lengths)])
    out = _reused("out", int(places[-1]))
    _gather(text, starts, lengths, out, places[:-1])
    entries = np.zeros(len(keys), _ENTRY)
    entries["key"], entries["length"] = keys, lengths
    packed = memoryview(entries.tobytes())
    counts, sizes = np.diff(firsts), np.diff(places[firsts])
    firsts, places = firsts.tolist(), places[firsts].tolist()
    for bucket in np.flatnonzero(counts).tolist():
        head = struct.pack(_HEAD, counts[bucket], sizes[bucket])
        mine = packed[firsts[bucket] * _ENTRY.itemsize : firsts[bucket + 1] * _ENTRY.itemsize]
        descriptor = os.open(f"{folder}/bucket_{bucket}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:  # in one write: others append to it too
            _write_all(descriptor, [head, mine, out[places[bucket] : places[bucket + 1]]])
        finally:
            os.close(descriptor)
    return counts, sizes


_blocks: dict = {}


def _reused(use: str, size: int) -> memoryview:
    """`size` bytes that stay this process's and are overwritten at the next call for that use: the system clears new
    memory page by page, which takes longer than to fill it."""
    if len(_blocks.get(use, b"")) < size:
        _blocks.pop(use, None)
        _blocks[use] = bytearray(size)
    return memoryview(_blocks[use])[:size]


def _gather(source: memoryview, starts: np.ndarray, lengths: np.ndarray, out: memoryview, places: np.ndarray) -> None:
    """Copies each line of `source` to its place in `out`."""
    for some in range(0, len(starts), _AT_ONCE):
        rows = slice(some, some + _AT_ONCE)
        begins, ats, sizes = starts[rows], places[rows], lengths[rows]
        for start, stop, at, end in zip(
            begins.tolist(), (begins + sizes).tolist(), ats.tolist(), (ats + sizes).tolist()
        ):
            out[at:end] = source[start:stop]


def _keyed(piece: _Piece, seed: int, label_first: bool, memory) -> _Lines:
    """The lines of a piece and their keys. memory: number of bytes -> what they are read into."""
    begin, text = _own_lines(piece, memory)
    ends = _plain(text, label_first)
    if ends is not None:
        starts = np.concatenate([[0], ends[:-1]])
        return _Lines(text, starts, ends - starts, _keys(seed, piece.part, (begin + starts).astype(np.uint64)))
    lines = bytes(text).split(b"\n")
    places = begin + np.concatenate([[0], np.cumsum([len(line) + 1 for line in lines])[:-1]]).astype(np.int64)
    lines = [_checked(*one, label_first, piece.path) for one in zip(lines, places.tolist())]
    lengths = np.fromiter(map(len, lines), np.int64, len(lines))
    keys = _keys(seed, piece.part, places.astype(np.uint64))
    return _Lines(memoryview(b"".join(lines)), np.cumsum(lengths) - lengths, lengths, keys)


def _write_all(descriptor: int, parts: list) -> None:
    """All of them at the file's position, without putting them together first."""
    for start in range(0, len(parts), _AT_ONCE):
        some = parts[start : start + _AT_ONCE]
        if os.writev(descriptor, some) != sum(map(len, some)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _own_lines(piece: _Piece, memory) -> tuple[int, memoryview]:
    """The lines that begin in the piece, and the byte of the file where the first of them begins."""
    with open(piece.path, "rb") as file:
        begin, end = (_next_line(file, at, piece.path) for at in (piece.start, piece.stop))
        file.seek(begin)
        text = memory(end - begin)
        return begin, text[: file.readinto(text)]


def _next_line(file, at: int, path: Path) -> int:
    """Where the first line begins that does so at this byte or behind it."""
    if not at:
        return 0
    file.seek(at - 1)
    rest = file.readline(_MAX_LINE)
    if len(rest) == _MAX_LINE:
        raise DataError(f"{path}: a line of more than {_MAX_LINE} bytes: this is no base64 list")
    return at - 1 + len(rest)


def _plain(text: memoryview, label_first: bool) -> Optional[np.ndarray]:
    """Where the lines of `text` end, if all of them are exactly `base64<TAB>label<NEWLINE>`; else None. Looks at all of
    them at once."""
    if label_first or not len(text):
        return None
    bytes_N, ends, others, equals = np.frombuffer(text, np.uint8), [], [], 0
    for at in range(0, len(text), _IN_CACHE):
        some = bytes(text[at : at + _IN_CACHE])
        others.append(some.translate(None, _ALPHABET + b"="))
        equals += some.count(b"=")
        ends.append(at + np.flatnonzero(bytes_N[at : at + _IN_CACHE] == ord("\n")))
    ends = np.concatenate(ends)
    if not len(ends) or b"".join(others) != b"\t\n" * len(ends):
        return None
    # the last bytes of each line from behind: its label, a tab, and what comes before
    tail_LK = bytes_N[np.maximum(ends[:, None] - np.arange(1, _MAX_DIGITS + 2), 0)]
    is_tab_LK = tail_LK == ord("\t")
    labels = is_tab_LK.argmax(1)  # digits before the tab
    tabs, rows = ends - labels - 1, np.arange(len(ends))
    images = tabs - np.concatenate([[0], ends[:-1] + 1])
    if not is_tab_LK.any(1).all() or labels.min() < 1 or images.min() < 1 or (images % 4).any():
        return None
    of_label_LK = np.arange(_MAX_DIGITS + 1) < labels[:, None]
    leading_zero = (tail_LK[rows, labels - 1] == ord("0")) & (labels > 1)
    if (of_label_LK & ((tail_LK < ord("0")) | (tail_LK > ord("9")))).any() or leading_zero.any():
        return None
    last, before = bytes_N[tabs - 1] == ord("="), bytes_N[tabs - 2] == ord("=")
    if (before & ~last).any() or equals != last.sum() + before.sum():
        return None
    return ends + 1


def _is_padded(image: bytes) -> bool:
    """Whether letters of base64 are a whole number of groups, with = only as the last one or two."""
    left = len(image) - image.find(b"=") if b"=" in image else 0
    return (
        image != b"" and len(image) % 4 == 0 and (left < 2 or left == 2 and image.endswith(b"==")) and left < len(image)
    )


def _checked(line: bytes, offset: int, label_first: bool, path: Path) -> bytes:
    """The line as `base64<TAB>label<NEWLINE>`, a blank one as nothing; DataError with its number else."""
    line = line.rstrip(b"\r")
    if not line.strip():
        return b""
    first, tab, second = line.partition(b"\t")
    label, image = (first, second) if label_first else (second, first)
    if not tab:
        problem = "has no tab between image and label"
    elif not label.isdigit() or len(label) > _MAX_DIGITS:
        problem = f"its label {label[:20].decode('latin1')!r} is no number"
    elif image.translate(None, _ALPHABET + b"=") or not _is_padded(image):
        problem = "its image is not base64"
    else:
        return b"%s\t%d\n" % (image, int(label))
    with open(path, "rb") as file:
        number = 1 + sum(file.read(min(1 << 20, offset - at)).count(b"\n") for at in range(0, offset, 1 << 20))
    order = "label<TAB>base64" if label_first else "base64<TAB>label"
    raise DataError(f"{path} line {number}: {problem}; '{order}' is needed, as on the list's first line")


def _keys(seed: int, part: int, offsets: np.ndarray) -> np.ndarray:
    """A random uint64 for each line: SplitMix64 of its place, from a start of its own for each seed and part."""
    start = int.from_bytes(hashlib.blake2b(b"%d %d" % (seed, part), digest_size=8).digest(), "little")
    keys = offsets * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


# --- second pass ------------------------------------------------------------------------------------------------------


def _write(folder: Path, lines: list, sizes: list, nranks: int, seed: int, workers: int) -> list[Path]:
    """The output parts, in `folder`. lines, sizes: of each bucket."""
    count = sum(lines)
    if not count:
        raise DataError("the list's part files hold no line")
    length = -(-count // nranks)
    begins = [0, *accumulate(lines)]
    # The byte where a bucket begins in its part is known before it is sorted, except for the few that a part ends in.
    slices, offset = [], 0
    for bucket in range(len(lines)):
        cuts = [*range(-(-begins[bucket] // length) * length, begins[bucket + 1], length)]
        if begins[bucket] % length == 0:
            offset, cuts = 0, cuts[1:]
        edges = [begins[bucket], *cuts, begins[bucket + 1]]
        lengths = [sizes[bucket]]
        if cuts:
            ordered = _load(folder / f"bucket_{bucket}", lines[bucket])[1]
            lengths = [
                int(ordered[start - begins[bucket] : stop - begins[bucket]].sum())
                for start, stop in zip(edges, edges[1:])
            ]
        mine = []
        for start, stop, size in zip(edges, edges[1:], lengths):
            if start in cuts:
                offset = 0
            mine.append(_Slice(start - begins[bucket], stop - begins[bucket], start // length, offset))
            offset += size
        slices.append(mine)
    made = [folder / f"base64_rank_{rank}" for rank in range(nranks)]
    for path in made:
        path.touch()
    drawn = _draw(count, length * nranks - count, seed)
    wanted = [[] for _ in lines]
    for at in set(drawn):
        bucket = bisect_right(begins, at) - 1
        wanted[bucket].append(at - begins[bucket])
    jobs = [job for job in zip(range(len(lines)), lines, sizes, slices, wanted) if lines[job[0]]]
    # processes that write to one file wait for each other: each has a stretch of the output
    apart = -(-len(jobs) // workers)
    jobs = [job for first in range(apart) for job in jobs[first::apart]]
    place = partial(_place, folder=folder, made=made)
    texts = {}
    for job, given in zip(jobs, spread(place, jobs, workers, "writing", "B", lambda job: job[2])):
        texts.update({begins[job[0]] + at: text for at, text in given.items()})
    for at, source in enumerate(drawn, start=count):
        with open(made[at // length], "ab") as file:
            file.write(texts[source])
    return made


def _write_at_once(
    folder: Path, parts: list[Path], nranks: int, seed: int, label_first: bool, workers: int
) -> list[Path]:
    """The output parts, in `folder`, of a set that fits into memory: the same as in two passes."""
    unit = max(1, sum(part.stat().st_size for part in parts) // (4 * workers))
    with ThreadPoolExecutor(workers) as threads:  # reading and writing need no interpreter
        read = partial(_keyed, seed=seed, label_first=label_first, memory=lambda size: memoryview(bytearray(size)))
        keyed = list(threads.map(read, _pieces(parts, unit)))
        texts = [
            lines.text[start:stop]
            for lines in keyed
            for start, stop in zip(lines.starts.tolist(), (lines.starts + lines.lengths).tolist())
        ]
        order = np.argsort(np.concatenate([lines.keys for lines in keyed]), kind="stable") if keyed else []
        ordered = [texts[row] for row in order if texts[row]]
        if not ordered:
            raise DataError("the list's part files hold no line")
        length = -(-len(ordered) // nranks)
        ordered += [ordered[row] for row in _draw(len(ordered), length * nranks - len(ordered), seed)]
        made = [folder / f"base64_rank_{rank}" for rank in range(nranks)]
        shares = [ordered[rank * length : (rank + 1) * length] for rank in range(nranks)]
        list(threads.map(_write_part, made, shares))
    return made


def _write_part(path: Path, lines: list) -> None:
    with open(path, "wb", buffering=0) as file:
        _write_all(file.fileno(), lines)


def _draw(count: int, shortfall: int, seed: int) -> list[int]:
    """Positions of the lines that stand in once more, distinct while they last."""
    source, drawn = random.Random(seed), []
    while len(drawn) < shortfall:
        drawn += source.sample(range(count), min(count, shortfall - len(drawn)))
    return drawn


def _load(path: Path, count: int, text: Optional[memoryview] = None) -> tuple[np.ndarray, np.ndarray]:
    """(where a bucket's lines begin in `text`, in the order of their keys; their lengths). text: is filled with them,
    where it is given."""
    entries, at, done, read = np.zeros(count, _ENTRY), 0, 0, 0
    packed = memoryview(entries.view(np.uint8))
    with open(path, "rb", buffering=0) as file:
        while done < len(packed):
            lines, size = struct.unpack(_HEAD, os.pread(file.fileno(), struct.calcsize(_HEAD), at))
            length = lines * _ENTRY.itemsize
            into = [packed[done : done + length]] + ([] if text is None else [text[read : read + size]])
            os.preadv(file.fileno(), into, at + struct.calcsize(_HEAD))
            at, done, read = at + struct.calcsize(_HEAD) + length + size, done + length, read + size
    order = np.argsort(entries["key"], kind="stable")
    lengths = entries["length"].astype(np.int64)
    return (np.cumsum(lengths) - lengths)[order], lengths[order]


def _place(job, folder: Path, made: list[Path]) -> dict[int, bytes]:
    """Writes one bucket to where it belongs; the lines asked for, by their position in the bucket."""
    number, count, size, slices, wanted = job
    path = folder / f"bucket_{number}"
    text, out = _reused("in", size), _reused("out", size)
    starts, lengths = _load(path, count, text)
    path.unlink()  # its memory in the system's cache is the output's next
    places = np.concatenate([[0], np.cumsum(lengths)])
    _gather(text, starts, lengths, out, places[:-1])
    for piece in slices:
        with open(made[piece.part], "r+b", buffering=0) as file:
            file.seek(piece.offset)
            _write_all(file.fileno(), [out[places[piece.start] : places[piece.stop]]])
    return {row: bytes(out[places[row] : places[row + 1]]) for row in wanted}


# --- the end ----------------------------------------------------------------------------------------------------------


class _scratch:
    """A folder of our own in the set's, without what an interrupted run left there; gone in the end."""

    def __init__(self, root: Path):
        self.path = root / _SCRATCH

    def __enter__(self) -> Path:
        self.path.mkdir(exist_ok=True)
        self.lock = open(self.path / "lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{self.path}: another run shuffles this set now: wait for its end") from None
        for file in self.path.glob("*_*"):
            file.unlink()
        return self.path

    def __exit__(self, *error) -> None:
        self.lock.close()
        shutil.rmtree(self.path)


def _publish(root: Path, list_path: Path, made: list[Path]) -> list[Path]:
    """Moves the finished parts beside the input, then the list: until then the old one names the old parts."""
    generation = 0
    while True:
        suffix = f".{generation}" if generation else ""
        paths = [root / (path.name + suffix) for path in made]
        if not any(path.exists() for path in paths):
            break
        generation += 1
    for source, target in zip(made, paths):
        os.replace(source, target)
    before = list_path.with_name(list_path.name + ".before")
    if not before.exists():
        shutil.copyfile(list_path, before)
    partial_list = made[0].with_name("new_list")
    partial_list.write_text("".join(f"{path.name}\n" for path in paths), encoding="utf-8")
    os.replace(partial_list, list_path)
    return paths
