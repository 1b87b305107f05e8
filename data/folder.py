"""Image folders: `imgs/<class>/<image>.jpg`, in the order of torchvision's ImageFolder (which is not needed here)."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from data.files import FileDataset, PackedStrings
from data.images import IMAGE_SUFFIXES
from runtime.errors import DataError, printable

log = logging.getLogger(__name__)


def class_names(root) -> list[str]:
    """The class folders of `root`, sorted as strings ("10" stands before "2"); class i is the i-th."""
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror})") from None


def open_folder(root, channel_order: str = "rgb", num_classes: Optional[int] = None, size: int = 112) -> FileDataset:
    """The training set in a folder of class folders. Raises DataError for none, or for a class without images."""
    root = Path(root)
    names = class_names(root)
    if not names:
        raise DataError(f"{root}: holds no class folder: images belong into {root.name}/<class>/<image>.jpg")
    labels = array("q")

    def paths() -> Iterator[str]:
        for label, name in enumerate(names):
            before = len(labels)
            for folder, files in _walk(root, root / name):
                for file in files:
                    if file.lower().endswith(IMAGE_SUFFIXES):
                        labels.append(label)
                        yield os.path.relpath(os.path.join(folder, file), root)
            if len(labels) == before:
                raise DataError(f"{root / name}: this class folder holds no image: remove it or fill it")

    packed = PackedStrings(paths())
    return FileDataset(root, packed, labels, str(root), channel_order, num_classes, size)


def _walk(root: Path, top: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files) of `top` and everything below it, sorted, through links as well.

    Each folder is seen once: a link to where it has been, or to above it, would repeat the set or never end.
    """
    seen = {os.path.realpath(folder) for folder in (root, *root.resolve().parents)}
    for folder, below, files in os.walk(top, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            log.warning("%s is a link to a folder that is in the set already: left out", printable(folder))
            below.clear()
            continue
        seen.add(real)
        below.sort()
        yield folder, sorted(files)


def _unreadable(error: OSError):
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None


def has_class_folders(root) -> bool:
    """Whether some folder directly in `root` directly holds an image."""
    for name in class_names(root):
        try:
            with os.scandir(Path(root) / name) as entries:
                if any(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries):
                    return True
        except OSError as error:
            _unreadable(error)
    return False
