"""What every training set is here: N encoded images with an integer class each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np

from data.images import check_channel_order, decode_image, image_size
from runtime.errors import DamagedItem, DataError

MAX_CLASSES = 1 << 31  # a class beyond is no label that somebody gave


def parse_class(text) -> Optional[int]:
    """The class that a list's field (str or bytes) names; None unless it is a whole number below MAX_CLASSES."""
    if not text.isdigit() or not text.isascii() or len(text.lstrip("0" if isinstance(text, str) else b"0")) > 10:
        return None
    number = int(text)
    return number if number < MAX_CLASSES else None


class ImageDataset:
    """Base of the sets that `open_dataset` returns.

    A reader sets `num_classes` and implements `__len__`, `encoded`, `describe` and `labels`; it must survive a fork
    and a pickle, because loader workers are started both ways.
    """

    num_classes: int
    size: tuple[int, int]  # height, width of every image
    channel_order: str  # as the files hold it; what comes out is RGB

    def __init__(self, size: int = 112, channel_order: str = "rgb"):
        self.size = (size, size)
        self.channel_order = check_channel_order(channel_order)

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]: the class of every image."""
        raise NotImplementedError

    def encoded(self, index: int):
        """(encoded image bytes, class) of one image; DamagedItem if it cannot be read."""
        raise NotImplementedError

    def describe(self, index: int) -> str:
        """File and place of one image, for messages."""
        raise NotImplementedError

    def load_into(self, index: int, out_HWC: np.ndarray) -> int:
        """Decode image `index` into uint8 [H, W, 3] as RGB and return its class.

        Raises DamagedItem (the image) or DataError (its label), naming file and place.
        """
        try:
            data, label = self.encoded(index)
            decode_image(data, self.channel_order, out_HWC)
        except DamagedItem as error:
            raise DamagedItem(f"{self.describe(index)}: {error}") from None
        if not 0 <= label < self.num_classes:
            raise DataError(
                f"{self.describe(index)}: label {label} is outside the {self.num_classes} classes: "
                "correct the label or num_classes"
            )
        return label

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(uint8 [H, W, 3] RGB, class)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        image_HWC = np.empty((*self.size, 3), np.uint8)
        return image_HWC, self.load_into(index % len(self), image_HWC)

    def check_first_image(self) -> None:
        """One look at open time: a whole set of the wrong size should not fail image by image."""
        try:
            size = image_size(self.encoded(0)[0])
        except DamagedItem:
            return  # one damaged image is the loader's business
        if size != self.size:
            raise DataError(
                f"{self.describe(0)}: images are {size[1]}x{size[0]}, {self.size[1]}x{self.size[0]} is "
                "needed: align and crop the faces first"
            )


class ConcatDataset(ImageDataset):
    """Sets one after the other; each one's classes follow those of the sets before it."""

    def __init__(self, parts: Sequence[ImageDataset], num_classes: Optional[int] = None):
        super().__init__(parts[0].size[0])
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self._first_class = np.cumsum([0, *(part.num_classes for part in parts)])
        self.num_classes = settle_classes(int(self._first_class[-1]), num_classes, "the sets together")

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def labels(self) -> np.ndarray:
        # -1 (unreadable) stays -1
        return np.concatenate(
            [np.where(part.labels < 0, -1, part.labels + first) for part, first in zip(self.parts, self._first_class)]
        )

    def _locate(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)

    def describe(self, index: int) -> str:
        part, inner = self._locate(index)
        return self.parts[part].describe(inner)

    def load_into(self, index: int, out_HWC: np.ndarray) -> int:
        part, inner = self._locate(index)
        return self.parts[part].load_into(inner, out_HWC) + int(self._first_class[part])


def settle_classes(counted: int, num_classes: Optional[int], place: str) -> int:
    """The class count: what the user said if the labels fit in it, else what was counted."""
    if num_classes is None:
        return counted
    if counted > num_classes:
        raise DataError(
            f"{place}: holds label {counted - 1}, beyond num_classes={num_classes}: "
            f"leave num_classes out or set it to {counted}"
        )
    return num_classes
