"""What is in a set of images: damaged ones, the same image twice, nearly the same image twice.

Every image is decoded once. Equal pixels are exact duplicates. Near duplicates (another compression, size or brightness
of one photo) are found by difference hashes: whether each pixel of a 9x8 thumbnail is brighter than its neighbour to
the right, and of an 8x9 one than that below, 64 bits each.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Callable, Optional

import numpy as np
from PIL import Image

from data.parallel import ranges, spread
from runtime.errors import DamagedItem, DataError

NEAR_BITS = 3  # of either hash: images that differ in no more are nearly the same
_BANDS = 4  # hashes that differ in fewer bits than this share one of so many parts of them
_MAX_BAND = 2000  # images of one part that are compared with each other: flat images share all


@dataclass
class Fingerprints:
    """pixels: uint64 [N], a hash of the decoded image; across, down: uint64 [N]; damaged: {row: why}."""

    pixels: np.ndarray
    across: np.ndarray
    down: np.ndarray
    damaged: dict


def fingerprints(read: Callable, count: int, workers: Optional[int] = None, desc: str = "looking") -> Fingerprints:
    """read: row -> uint8 [H, W, 3], or DamagedItem or DataError; it is sent to the worker processes."""
    rows, damaged = [], {}
    for more, problems in spread(partial(_look, read), ranges(count), workers, desc, size=len):
        rows.append(more)
        damaged.update(problems)
    pixels, across, down = np.concatenate(rows).T if rows else np.zeros((3, 0), np.uint64)
    return Fingerprints(pixels, across, down, damaged)


def _look(read: Callable, rows: range) -> tuple[np.ndarray, dict]:
    found, damaged = np.zeros((len(rows), 3), np.uint64), {}
    for place, row in enumerate(rows):
        try:
            image_HWC = read(row)
        except (DamagedItem, DataError) as error:
            damaged[row] = str(error)
            continue
        image = Image.fromarray(image_HWC).convert("L")
        across = np.asarray(image.resize((9, 8), Image.BILINEAR), np.int16)
        down = np.asarray(image.resize((8, 9), Image.BILINEAR), np.int16)
        digest = hashlib.sha256(np.ascontiguousarray(image_HWC)).digest()[:8]
        found[place] = (
            int.from_bytes(digest, "little"),
            _bits(across[:, 1:] > across[:, :-1]),
            _bits(down[1:] > down[:-1]),
        )
    return found, damaged


def _bits(values: np.ndarray) -> int:
    return int.from_bytes(np.packbits(values).tobytes(), "big")


def equal_pairs(one: Fingerprints, other: Optional[Fingerprints] = None) -> list[tuple[int, int]]:
    """(row, row) of images with equal pixels: within one set each with the first like it, or across two sets."""
    first, pairs = {}, []
    for row, value in enumerate(one.pixels.tolist()):
        if row in one.damaged:
            continue
        if value in first and other is None:
            pairs.append((first[value], row))
        first.setdefault(value, row)
    if other is not None:
        rows = enumerate(other.pixels.tolist())
        pairs = [(first[value], row) for row, value in rows if value in first and row not in other.damaged]
    return pairs


def near_pairs(one: Fingerprints, other: Optional[Fingerprints] = None) -> list[tuple[int, int]]:
    """(row, row) of images that differ by at most NEAR_BITS in either hash and are not equal; as `equal_pairs`."""
    sets = (one,) if other is None else (one, other)
    across = np.concatenate([part.across for part in sets])
    down = np.concatenate([part.down for part in sets])
    pixels = np.concatenate([part.pixels for part in sets])
    whole = np.concatenate([~np.isin(np.arange(len(p.pixels)), list(p.damaged)) for p in sets])
    second = np.arange(len(across)) >= len(one.pixels)
    found = set()
    for band in range(_BANDS):
        part = (across >> np.uint64(16 * band)).astype(np.uint16)
        order = np.argsort(part, kind="stable")
        order = order[whole[order]]
        for rows in np.split(order, 1 + np.flatnonzero(np.diff(part[order]))):
            if not 1 < len(rows) <= _MAX_BAND:
                continue
            near = (_distance(across[rows]) <= NEAR_BITS) & (_distance(down[rows]) <= NEAR_BITS)
            near &= pixels[rows][:, None] != pixels[rows][None]
            for a, b in zip(*np.nonzero(np.triu(near, 1))):
                a, b = sorted((int(rows[a]), int(rows[b])))
                if other is None:
                    found.add((a, b))
                elif second[a] != second[b]:
                    found.add((a, b - len(one.pixels)))
    return sorted(found)


def _distance(hashes_N: np.ndarray) -> np.ndarray:
    """In how many bits each two differ, [N, N]."""
    different = hashes_N[:, None] ^ hashes_N[None]
    return np.unpackbits(different.view(np.uint8).reshape(*different.shape, 8), axis=-1).sum(-1, dtype=np.int16)
