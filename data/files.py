"""A training set of single image files: millions of paths and their classes, compact in memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

import numpy as np

from data import kv_bin
from data.dataset import ImageDataset, settle_classes
from data.images import read_file
from runtime.errors import DataError


class PackedStrings:
    """An immutable list of strings in one block of bytes.

    Six million Python strings take half a gigabyte, and each forked worker would copy them page by page as their
    reference counts change; this takes their bytes and 8 more each, and is never written again.
    """

    def __init__(self, strings: Iterable[str]):
        block, ends = bytearray(), array("q", [0])
        for string in strings:
            block += os.fsencode(string)
            ends.append(len(block))
        self._block, self._ends = bytes(block), np.array(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._block[self._ends[index] : self._ends[index + 1]])


class FileDataset(ImageDataset):
    """Images `root / paths[i]` of class `labels[i]`; a path ending in .bin holds one image as key and value."""

    def __init__(
        self,
        root,
        paths: PackedStrings,
        labels,
        place: str,
        channel_order: str = "rgb",
        num_classes: Optional[int] = None,
        size: int = 112,
    ):
        super().__init__(size, channel_order)
        if len(paths) == 0:
            raise DataError(f"{place}: lists no image")
        self.root, self._paths = Path(root), paths
        self._labels = np.array(labels, np.int64)
        self.num_classes = settle_classes(int(self._labels.max()) + 1, num_classes, place)
        self.check_first_image()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def labels(self) -> np.ndarray:
        return self._labels

    def describe(self, index: int) -> str:
        return str(self.root / self._paths[index])

    def encoded(self, index: int):
        path = self.root / self._paths[index]
        data = read_file(path)
        return kv_bin.parse(data)[1] if path.suffix == ".bin" else data, int(self._labels[index])
