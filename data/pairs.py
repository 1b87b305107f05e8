"""Verification sets: N pairs of face images, each the same person or not.

Three formats: InsightFace's `lfw.bin` (a pickle), InsightFace_Pytorch's bcolz array `lfw/` with `lfw_list.npy`, and a
folder `lfw/` with `label.txt` and one folder per pair. Images are decoded when they are asked for.
"""

from __future__ import annotations

import json
import logging
import os
import pickle  # only to write; reading goes through data.safe_pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import numpy as np

from data import safe_pickle
from data.images import (
    IMAGE_SUFFIXES,
    check_channel_order,
    decode_image,
    inside,
    read_file,
    read_text_file,
    recorded_channel_order,
)
from data.npy import read_npy
from runtime.errors import DamagedItem, DataError
from runtime.files import atomic_file, open_regular, write_text

log = logging.getLogger(__name__)

VERIFICATION_SETS = ("lfw", "cfp_fp", "cfp_ff", "agedb_30", "calfw", "cplfw", "vgg2_fp", "synthetic")
_MAX_BIN_BYTES = 4 << 30  # the sets in use have a tenth of a gigabyte
_MAX_META_BYTES = 1 << 20
_MAX_ANSWERS_BYTES = 64 << 20
_MAX_CHUNK_IMAGES = 4096  # bcolz allocates a chunk when an array is opened
# bloscpack: "blpk", version, number of chunks (16 bytes); then blosc: flags, unpacked bytes, block size, packed bytes
_CHUNK_HEADER = struct.Struct("<4s12x4xI4xI")


class PairImages:
    """2N images; pair i is images 2i and 2i+1. `len()`; `[i:j]` gives uint8 [n, H, W, 3] RGB, `[i]` one image."""

    size: tuple[int, int]

    def __init__(self, count: int, size: int):
        self._count, self.size = count, (size, size)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows) -> np.ndarray:
        if not isinstance(rows, slice):
            row = range(len(self))[rows]
            return self[row : row + 1][0]
        rows = range(*rows.indices(len(self)))
        images_BHWC = np.empty((len(rows), *self.size, 3), np.uint8)
        self._fill(rows, images_BHWC)
        return images_BHWC

    def _fill(self, rows: range, out_BHWC: np.ndarray) -> None:
        raise NotImplementedError


class _EncodedPairs(PairImages):
    """Images in memory or in files, encoded. items: bytes, or paths."""

    def __init__(self, items: Sequence, place: str, channel_order: str, size: int):
        super().__init__(len(items), size)
        self._items, self._place, self._channel_order = items, place, channel_order

    def _fill(self, rows: range, out_BHWC: np.ndarray) -> None:
        for slot, row in enumerate(rows):
            item = self._items[row]
            try:
                data = read_file(item) if isinstance(item, Path) else item
                decode_image(data, self._channel_order, out_BHWC[slot])
            except DamagedItem as error:
                where = item if isinstance(item, Path) else f"{self._place} image {row} (pair {row // 2})"
                raise DataError(f"{where}: {error}") from None


class _BcolzPairs(PairImages):
    """float32 [2N, 3, H, W], (x / 255 - 0.5) / 0.5, in compressed chunks on disk."""

    def __init__(self, array, place: str, channel_order: str, size: int):
        super().__init__(len(array), size)
        self._array, self._place, self._channel_order = array, place, channel_order

    def _fill(self, rows: range, out_BHWC: np.ndarray) -> None:
        for slot, row in enumerate(rows):
            try:
                image_CHW = self._array[row]
            except Exception as error:  # bcolz reports a bad chunk in many ways
                raise DataError(
                    f"{self._place} image {row}: chunk cannot be read ({type(error).__name__}): prepare the set again"
                ) from None
            image_HWC = np.rint((image_CHW.transpose(1, 2, 0) * 0.5 + 0.5) * 255).clip(0, 255).astype(np.uint8)
            out_BHWC[slot] = image_HWC[:, :, ::-1] if self._channel_order == "bgr" else image_HWC


def load_pairs(path, channel_order: Optional[str] = None, size: int = 112) -> tuple[PairImages, np.ndarray]:
    """(images, issame bool [N]) of a verification set in any of the three formats.

    channel_order: the order in which the file holds its channels; None takes what was recorded beside it, else "bgr"
    for bcolz (its original tool never swapped OpenCV's channels) and "rgb" for encoded images.
    Raises DataError for a missing or damaged set, an odd number of images, or a pickle that names code.
    """
    path = Path(path)
    if channel_order is not None:
        check_channel_order(channel_order)
    load = next((one.load for one in FORMATS if one.recognises(path)), None)
    if load is None:
        there = os.path.exists(path)
        what = (
            "neither a bcolz array (meta/sizes) nor a pair folder (label.txt)" if there else "no such verification set"
        )
        raise DataError(f"{path}: {what}")
    images, issame = load(path, channel_order, size)
    if len(issame) == 0:
        raise DataError(f"{path}: holds no pair")
    if len(images) != 2 * len(issame):
        raise DataError(
            f"{path}: {len(images)} images for {len(issame)} pairs, where {2 * len(issame)} are needed: "
            "the set is damaged"
        )
    return images, issame


class PairFormat(NamedTuple):
    """How verification sets of one kind are told from others, and loaded."""

    name: str
    recognises: Callable[[Path], bool]
    load: Callable[[Path, Optional[str], int], tuple[PairImages, np.ndarray]]


def register(name: str, recognises: Callable[[Path], bool]):
    """Enters a format of your own for verification sets; decorates the function that loads it.

    The decorated is called with (path, channel_order or None, size) and gives (images, issame) as `load_pairs` does,
    for a path (file or folder) of which `recognises` is true. Raises DataError for a name that is taken.
    """

    def enter(load):
        if any(one.name == name for one in FORMATS):
            raise DataError(f"pair format {name!r}: there is one of this name already: choose another")
        FORMATS.insert(0, PairFormat(name, recognises, load))
        return load

    return enter


def find_pair_sets(root, names: Sequence[str] = VERIFICATION_SETS) -> dict[str, Path]:
    """{name: path} of those sets which stand in folder `root`, as .bin, bcolz or folder. A file is its own set."""
    root = Path(root)
    if os.path.isfile(root):
        return {root.stem: root}
    files = sorted(os.listdir(root)) if os.path.isdir(root) else []
    found = {}
    for name in names:
        places = [root / file for file in (f"{name}.bin", name, *(f for f in files if f.startswith(f"{name}.")))]
        for path in places:
            # a file is taken for a .bin when it is named, and for what it is called when it is looked for
            if any(one.recognises(path) for one in FORMATS if one.name != "bin" or path.suffix == ".bin"):
                found[name] = path
                break
    return found


def read_bin(path) -> tuple[list[bytes], np.ndarray]:
    """(encoded images, issame bool [N]) of a verification `.bin`."""
    path = Path(path)
    try:
        data = read_file(path, _MAX_BIN_BYTES)
    except DamagedItem as error:
        raise DataError(f"{path}: {error}") from None
    value = safe_pickle.load(data, str(path))
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not isinstance(value[0], (list, tuple)):
        raise DataError(f"{path}: is not a verification set: a pickle of (images, issame list) is expected")
    images = []
    for number, item in enumerate(value[0]):
        item = safe_pickle.as_array(item)
        if isinstance(item, np.ndarray) and item.dtype == np.uint8:
            item = memoryview(item).cast("B") if item.size else b""  # a copy each would be more than the file holds
        if not isinstance(item, (bytes, bytearray, memoryview)):
            raise DataError(f"{path}: image {number} is neither bytes nor a uint8 array: the set is damaged")
        images.append(item)
    return images, _read_issame(safe_pickle.as_array(value[1]), path)


def _read_issame(values, path: Path) -> np.ndarray:
    try:
        answers = [safe_pickle.as_array(value) for value in values]
        if not all(np.ndim(value) == 0 and value in (0, 1) for value in answers):
            raise ValueError("neither true nor false")
        answers = np.array(answers, bool)
    except (TypeError, ValueError):
        raise DataError(f"{path}: its list of answers does not hold booleans: the set is damaged") from None
    return answers


def write_bin(path, images: Sequence[bytes], issame: Sequence[bool]) -> None:
    """Write a verification `.bin` as InsightFace reads it. images: 2N encoded images."""
    with atomic_file(path, DataError) as file:
        pickle.dump((list(images), [bool(same) for same in issame]), file, protocol=2)


def write_folder(path, images: Sequence[bytes], issame: Sequence[bool]) -> None:
    """Write a verification folder: `<pair>/0.jpg`, `<pair>/1.jpg` and label.txt. images: 2N encoded JPEGs."""
    path = Path(path)
    for row, data in enumerate(images):
        folder = path / f"{row // 2:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row % 2}.jpg").write_bytes(data)
    write_text(path / "label.txt", "".join(f"{pair:06d} {bool(same)}\n" for pair, same in enumerate(issame)), DataError)


def _load_bin(path: Path, channel_order: Optional[str], size: int) -> tuple[PairImages, np.ndarray]:
    images, issame = read_bin(path)
    return _EncodedPairs(images, str(path), channel_order or "rgb", size), issame


def _load_bcolz(path: Path, channel_order: Optional[str], size: int) -> tuple[PairImages, np.ndarray]:
    try:
        import bcolz
    except ImportError:
        raise DataError(
            f"{path}: reading bcolz arrays needs the package bcolz-zipline: pip install it, or use {path.name}.bin"
        ) from None
    # bcolz unpickles arrays of objects and allocates what the meta files say: look at them first.
    try:
        shape = json.loads(read_file(path / "meta" / "sizes", _MAX_META_BYTES))["shape"]
        storage = json.loads(read_file(path / "meta" / "storage", _MAX_META_BYTES))
        dtype, chunk = storage["dtype"], storage["chunklen"]
        if os.path.lexists(path / "__attrs__"):
            read_file(path / "__attrs__", _MAX_META_BYTES)  # bcolz will, whatever it is
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: its meta files cannot be read ({error}): prepare the set again") from None
    rows = shape[0] if isinstance(shape, list) and shape and isinstance(shape[0], int) else -1
    if rows < 0 or shape != [rows, 3, size, size] or dtype != "float32" or not isinstance(chunk, int):
        raise DataError(f"{path}: holds {dtype} {shape}, where float32 [2N, 3, {size}, {size}] is needed")
    if not 1 <= chunk <= _MAX_CHUNK_IMAGES:
        raise DataError(
            f"{path}: chunks of {chunk} images; at most {_MAX_CHUNK_IMAGES} are read: prepare the set again"
        )
    _check_chunks(path, rows, chunk, 3 * size * size * 4)
    answers = path.with_name(path.name + "_list.npy")
    try:
        issame = read_npy(read_file(answers, _MAX_ANSWERS_BYTES), answers.name)
        array = bcolz.carray(rootdir=str(path), mode="r")
    except Exception as error:  # numpy and bcolz report damaged files in many ways
        raise DataError(
            f"{path}: cannot be opened with {answers.name} ({str(error)[:100]}): prepare the set again"
        ) from None
    if channel_order is None:
        channel_order = recorded_channel_order(path)
    if channel_order is None:
        channel_order = "bgr"
        log.info("%s: no channel order is recorded beside it: taken as bgr, which its original tool writes", path)
    return _BcolzPairs(array, str(path), channel_order, size), _read_issame(issame.ravel(), answers)


def _check_chunks(path: Path, rows: int, rows_per_chunk: int, row_bytes: int) -> None:
    """Compare the header of every chunk file with its size: bcolz hands both to C code that trusts them."""
    for number, first in enumerate(range(0, rows, rows_per_chunk)):
        file = path / "data" / f"__{number}.blp"
        expected = min(rows_per_chunk, rows - first) * row_bytes
        try:
            with open_regular(file) as chunk:
                head = chunk.read(_CHUNK_HEADER.size)
                stored = chunk.seek(0, 2) - 16
            magic, unpacked, packed = _CHUNK_HEADER.unpack(head)
        except (OSError, struct.error):
            raise DataError(f"{file}: missing or cut off: prepare the set again") from None
        if magic != b"blpk" or unpacked != expected or packed != stored:
            raise DataError(f"{file}: its header does not fit its size: damaged, prepare the set again")


def _load_folder(path: Path, channel_order: Optional[str], size: int) -> tuple[PairImages, np.ndarray]:
    list_path, files, issame = path / "label.txt", [], []
    for number, line in enumerate(read_text_file(list_path).splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        place = f"{list_path} line {number}"
        pair, _, answer = line.strip().replace("\t", " ").rpartition(" ")
        if answer.lower() not in ("true", "false", "1", "0"):
            raise DataError(f"{place}: {line[:60]!r} is not 'pair_id True' or 'pair_id False'")
        folder = inside(path, pair.strip(), place)
        try:
            found = sorted(folder / name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES))
        except OSError as error:
            raise DataError(f"{place}: {folder} cannot be read ({error.strerror})") from None
        if len(found) != 2:
            raise DataError(f"{place}: {folder} holds {len(found)} images, a pair is exactly two")
        files += found
        issame.append(answer.lower() in ("true", "1"))
    order = channel_order or recorded_channel_order(path) or "rgb"
    return _EncodedPairs(files, str(path), order, size), np.array(issame, bool)


FORMATS = [
    PairFormat("bin", os.path.isfile, _load_bin),
    PairFormat("bcolz", lambda path: os.path.isfile(path / "meta" / "sizes"), _load_bcolz),
    PairFormat("folder", lambda path: os.path.isfile(path / "label.txt"), _load_folder),
]
