"""Image lists: `label.txt` with a line `relative/path.jpg<space or tab>label` for each image."""

from __future__ import annotations

import io
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Optional

from data.dataset import parse_class
from data.files import FileDataset, PackedStrings
from data.images import inside
from runtime.errors import DataError
from runtime.files import atomic_file, open_regular

_MAX_LINE = 1 << 16  # no path is longer; a file without newlines must not be read whole


def read_list(path) -> Iterator[tuple[str, int]]:
    """(relative path, class) for each line. Paths may hold spaces: the class is the last field.

    Blank lines and those that begin with # are skipped. Raises DataError naming the line that is something else.
    """
    path = Path(path)
    try:
        with open_regular(path) as file, io.TextIOWrapper(file, "utf-8-sig", "surrogateescape") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(_MAX_LINE), ""), start=1):
                fields = line.rsplit(None, 1)
                if not fields or line.startswith("#"):
                    continue
                label = parse_class(fields[1]) if len(fields) == 2 else None
                if label is None:
                    raise DataError(
                        f"{path} line {number}: {line.strip()[:60]!r} is not 'path label' with a class from 0 upwards"
                    )
                name = fields[0].strip()
                if ".." in name or name[0] == "/" or "\0" in name:  # millions of lines: look closer only then
                    inside(path.parent, name, f"{path} line {number}")
                yield name, label
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def write_list(path, items: Iterable[tuple[str, int]]) -> None:
    """Write (relative path, class) as the lines of a list file, separated by a tab; it appears when complete."""
    with atomic_file(path, DataError) as file:
        for name, label in items:
            file.write(f"{name}\t{label}\n".encode("utf-8", "surrogateescape"))


def open_image_list(
    path, channel_order: str = "rgb", num_classes: Optional[int] = None, size: int = 112
) -> FileDataset:
    """The training set that a list file describes; paths are relative to the list's folder."""
    labels = array("q")

    def names() -> Iterator[str]:
        for name, label in read_list(path):
            labels.append(label)
            yield name

    packed = PackedStrings(names())
    return FileDataset(Path(path).parent, packed, labels, str(path), channel_order, num_classes, size)
