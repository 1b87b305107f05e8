"""InsightFace's training sets in RecordIO: `train.rec`, `train.idx`, `property`.

Record 0 is a header with two labels and no image: images are the keys 1 .. labels[0]-1, then comes one record for each
identity, whose two labels are its [first, last+1) image keys. Files without such a header exist too: then every key is
an image.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Optional

import numpy as np

from data.dataset import MAX_CLASSES, ImageDataset, parse_class, settle_classes
from data.recordio import MAX_EXACT_LABEL, RecordIOReader, to_class, unpack
from runtime.errors import DamagedItem, DataError
from runtime.files import open_regular

log = logging.getLogger(__name__)

_LOOKED_UP = 16  # identities whose class is compared with one of their images


class RecordIODataset(ImageDataset):
    """A training set in a `.rec`, with InsightFace's header and identity records or without.

    rec_path: the .rec; its .idx and `property` are looked for beside it.
    num_classes: the user's count; None counts the classes (the first number in `property` is sometimes wrong).
    """

    def __init__(self, rec_path, channel_order: str = "rgb", num_classes: Optional[int] = None, size: int = 112):
        super().__init__(size, channel_order)
        self.path = Path(rec_path)
        idx_path = self.path.with_suffix(".idx")
        if not idx_path.exists():
            log.info("%s is missing: the records are found by reading through %s", idx_path, self.path)
            idx_path = None
        self.reader = RecordIOReader(self.path, idx_path)
        self._labels: Optional[np.ndarray] = None
        self._identities = None
        header = self._header()
        if header is None:
            self._keys, self._offsets = self.reader.keys, self.reader.offsets()
        else:
            self._keys, self._offsets = None, self.reader.offsets(1, header[0])  # keys are position + 1
            self._identities = self._read_identities(*header)
        if len(self) == 0:
            raise DataError(f"{self.path}: holds no image")
        self.num_classes = self._count_classes(num_classes)
        self.check_first_image()

    def __len__(self) -> int:
        return len(self._offsets)

    def key(self, index: int) -> int:
        """The record key of image `index`."""
        return index + 1 if self._keys is None else int(self._keys[index])

    def describe(self, index: int) -> str:
        return f"{self.path} key {self.key(index)}"

    def encoded(self, index: int):
        labels, image = unpack(self.reader.read_at(int(self._offsets[index])))
        if not len(image):
            raise DamagedItem("the record holds no image")
        return image, to_class(labels[0])

    @property
    def labels(self) -> np.ndarray:
        """int64 [N], from the identity records where there are some, else from a look at every record's header.

        -1 stands for a record that cannot be read. In a set of more than 2^24 images the identity records' float32
        keys are rounded, and images next to a border may count to the neighbour; what `[i]` returns is always the
        image's own label.
        """
        if self._labels is None:
            if self._identities is not None:
                self._labels = np.repeat(*self._identities)
            else:
                self._labels = self.reader.first_labels(self._offsets)
        return self._labels

    def _header(self) -> Optional[tuple[int, int]]:
        """(first key, last key + 1) of the identity records, from InsightFace's header; None without one."""
        if 0 not in self.reader:
            return None
        try:
            labels, image = unpack(self.reader.read(0))
        except DamagedItem as error:
            raise DataError(f"{error}: the first record tells where the images are: copy the file again") from None
        if len(labels) != 2 or len(image):
            return None
        first, stop = (to_class(label) for label in labels)
        if not 1 <= first <= stop:
            raise DataError(
                f"{self.path}: header record announces image keys 1 to {first - 1} and identity keys up to "
                f"{stop - 1}: the file is damaged or not a training set"
            )
        if stop > MAX_EXACT_LABEL:  # the two numbers are float32 and rounded
            first, stop = self._first_without_image(first, int(np.spacing(np.float32(first)))), len(self.reader)
        return first, stop

    def _first_without_image(self, key: int, spread: int) -> int:
        """The first key from key - spread to key + spread whose record holds no image; `key` if all of them do."""
        for candidate in range(max(1, key - spread), key + spread + 1):
            if candidate in self.reader and not len(unpack(self.reader.read(candidate))[1]):
                return candidate
        return key

    def _read_identities(self, first_key: int, stop_key: int) -> Optional[tuple[np.ndarray, np.ndarray]]:
        """(class, number of images) of each identity, both int64; None where the identity records do not tile the
        images, so that only the images' own headers can tell."""
        ranges = self.reader.label_pairs(self.reader.offsets(first_key, stop_key))
        if ranges is None or not len(ranges) or not (np.abs(ranges) < MAX_CLASSES).all():  # nor nan
            return None
        if np.float32(first_key) == ranges[-1, 1]:  # equal but for rounding
            first, stop = ranges.astype(np.int64).T
            stop[-1] = first_key
        else:
            return None
        if first[0] != 1 or (first[1:] != stop[:-1]).any() or (first > stop).any():
            return None
        # By convention identity records are in the order of classes. A few are looked up; if one disagrees, all are.
        labels = np.arange(len(first))
        seen = np.flatnonzero(stop > first)
        for rows in (seen[:: max(1, len(seen) // _LOOKED_UP)], seen):
            found = self.reader.first_labels(self._offsets[first[rows] - 1])
            if (found[found >= 0] == labels[rows][found >= 0]).all():
                break
            labels[rows] = np.where(found >= 0, found, labels[rows])
        return labels, stop - first

    def _count_classes(self, num_classes: Optional[int]) -> int:
        if num_classes is not None and self._identities is None:
            return num_classes  # the labels are checked as they are read
        labels = self.labels if self._identities is None else self._identities[0]
        counted = int(labels.max()) + 1
        if counted < 1:
            raise DataError(f"{self.path}: no record holds a class: it is damaged or not a training set")
        listed = self._property()
        if num_classes is None and listed not in (None, counted):
            log.warning(
                "%s says %d classes, the records hold %d: using %d",
                self.path.with_name("property"),
                listed,
                counted,
                counted,
            )
        return settle_classes(counted, num_classes, str(self.path))

    def _property(self) -> Optional[int]:
        try:
            with open_regular(self.path.with_name("property")) as file:
                return parse_class(file.read(64).split(b",")[0].strip())
        except OSError:
            return None
