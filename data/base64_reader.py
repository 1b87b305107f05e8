"""PLSC's base64 lists: `file_list.txt` names part files; a part's line is base64(image) TAB label, or the reverse."""

from __future__ import annotations

import base64
import binascii
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from data.dataset import ImageDataset, parse_class, settle_classes
from data.images import inside, read_text_file
from runtime.errors import DamagedItem, DataError
from runtime.files import atomic_file, open_regular

_MAX_LINE = 64 << 20  # no image comes near it; a file without newlines must not be read whole


class Line(NamedTuple):
    """Where one image stands in a part file."""

    offset: int  # bytes from the part's start to the base64 field
    length: int  # of the base64 field
    label: int


def read_file_list(path) -> list[Path]:
    """The part files which a file list names, relative to its folder. DataError if one is missing or there is none."""
    path = Path(path)
    parts = []
    for number, line in enumerate(read_text_file(path).splitlines(), start=1):
        name = line.strip()
        if name:
            part = inside(path.parent, name, f"{path} line {number}")
            if not os.path.isfile(part):
                raise DataError(f"{path} line {number}: there is no part file {part}")
            parts.append(part)
    if not parts:
        raise DataError(f"{path}: names no part file")
    return parts


def label_comes_first(part) -> bool:
    """The order of the fields, from a part's first line; DataError where it cannot be told."""
    with _open_part(part) as file:
        fields = file.readline(_MAX_LINE).strip().split(b"\t")
    if len(fields) != 2 or fields[0].isdigit() == fields[1].isdigit():
        raise DataError(f"{part} line 1: is neither 'base64<TAB>label' nor 'label<TAB>base64'")
    return fields[0].isdigit()


def scan_part(part, label_first: bool) -> Iterator[Line]:
    """Every line of a part file, checked to have its two fields in the given order."""
    offset = 0
    with _open_part(part) as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), start=1):
            if len(line) == _MAX_LINE:
                raise DataError(f"{part} line {number}: longer than {_MAX_LINE} bytes: not a base64 list")
            first, tab, second = line.rstrip(b"\r\n").partition(b"\t")
            label, data = (first, second) if label_first else (second, first)
            number_of_class = parse_class(label)
            if not (tab and number_of_class is not None and data) or data.isdigit() or b"\t" in second:
                if line.strip():
                    order = "label<TAB>base64" if label_first else "base64<TAB>label"
                    raise DataError(f"{part} line {number}: is not '{order}' as the first line of the list is")
            else:
                yield Line(offset + (len(first) + 1 if label_first else 0), len(data), number_of_class)
            offset += len(line)


def _open_part(part):
    try:
        return open_regular(part)
    except OSError as error:
        raise DataError(f"{part}: cannot be read ({error.strerror})") from None


def write_part(path, items: Iterable[tuple[bytes, int]]) -> None:
    """Write (encoded image, class) as the lines `base64<TAB>label` of a part file; it appears when complete."""
    with atomic_file(path, DataError) as file:
        for image, label in items:
            file.write(base64.b64encode(image) + b"\t%d\n" % label)


class Base64Dataset(ImageDataset):
    """The images of a base64 list, read from their places in the part files: only those places stay in memory."""

    def __init__(self, file_list, channel_order: str = "rgb", num_classes: Optional[int] = None, size: int = 112):
        super().__init__(size, channel_order)
        self.parts = read_file_list(file_list)
        label_first = label_comes_first(self.parts[0])
        part_of, offsets, lengths, labels = array("i"), array("q"), array("i"), array("q")
        for number, part in enumerate(self.parts):
            for line in scan_part(part, label_first):
                part_of.append(number)
                offsets.append(line.offset)
                lengths.append(line.length)
                labels.append(line.label)
        self._part_of, self._offsets, self._lengths = np.array(part_of), np.array(offsets), np.array(lengths)
        self._labels = np.array(labels, np.int64)
        if not len(self):
            raise DataError(f"{file_list}: its part files hold no image")
        self.num_classes = settle_classes(int(self._labels.max()) + 1, num_classes, str(file_list))
        self.check_first_image()

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> np.ndarray:
        return self._labels

    def describe(self, index: int) -> str:
        return f"{self.parts[self._part_of[index]]} byte {self._offsets[index]}"

    def encoded(self, index: int):
        try:
            with open_regular(self.parts[self._part_of[index]]) as file:
                file.seek(int(self._offsets[index]))
                text = file.read(int(self._lengths[index]))
            return base64.b64decode(text, validate=True), int(self._labels[index])
        except OSError as error:
            raise DamagedItem(f"cannot be read ({error.strerror})") from None
        except binascii.Error as error:
            raise DamagedItem(f"not base64 ({error})") from None
