"""Training sets and verification sets, whatever their format: `open_dataset`, `build_loader`, `data.pairs.load_pairs`.

Everything that leaves this package is RGB and uint8; data.transforms.to_input makes it the network's input.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from data.base64_reader import Base64Dataset
from data.dataset import ConcatDataset, ImageDataset
from data.folder import has_class_folders, open_folder
from data.image_list import open_image_list
from data.images import recorded_channel_order
from data.insightface import RecordIODataset
from runtime.errors import DamagedItem, DataError
from runtime.files import open_regular

__all__ = ["DATA_MODES", "DamagedItem", "DataError", "ImageDataset", "build_loader", "open_dataset", "register"]

# InsightFace_Pytorch's names of sets, and the folders beneath the data path that they stand for.
DATA_MODES = {
    "vgg": ("faces_vgg_112x112",),
    "ms1m": ("faces_ms1m_112x112",),
    "emore": ("faces_emore",),
    "concat": ("faces_ms1m_112x112", "faces_vgg_112x112"),
}
_EMORE = (5822653, 85742)  # faces_emore's images and classes: what a run without a disk stands in for


def open_dataset(
    path, data_mode: Optional[str] = None, channel_order: Optional[str] = None, num_classes: Optional[int] = None
) -> ImageDataset:
    """The training set at `path`, whatever its format: len(), .num_classes, .labels, [i], .describe(i).

    path: a folder with train.rec, imgs/, label.txt, file_list.txt or class folders (looked for in this order), or one
    of those files itself, or the folder above the one that `data_mode` names.
    data_mode: vgg, ms1m, emore, concat (ms1m's classes, then vgg's), a folder's name, a registered format's, or
    synthetic (no path is read).
    channel_order: what the files hold, "rgb" or "bgr"; None takes what was recorded beside the files, else "rgb".
    num_classes: None counts them.
    Raises DataError, one line.
    """
    if num_classes is not None and num_classes < 1:
        raise DataError(f"num_classes {num_classes}: it must be at least 1")
    if data_mode == "synthetic":
        from data.synthetic import SyntheticDataset  # here, because python -m data.synthetic runs that module itself

        return SyntheticDataset(_EMORE[0], num_classes or _EMORE[1])
    path = Path(path)
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise DataError(f"{path}: no such file or folder: give the data set's folder as --data_path")
    for one in FORMATS:
        if one.name == data_mode and not os.path.isdir(path / data_mode):
            return _open(one, path, channel_order, num_classes)
    folders = _find_folders(path, data_mode)
    if len(folders) == 1:
        return _open_path(folders[0], channel_order, num_classes)
    return ConcatDataset([_open_path(folder, channel_order, None) for folder in folders], num_classes)


def build_loader(
    dataset: ImageDataset,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    num_workers: int = 0,
    strict: bool = False,
    pin_memory: str = "",
    class_balanced: bool = False,
):
    """A `data.loader.Loader` over one rank's share of a set: see there."""
    from data.loader import Loader  # loads torch, which the readers do without

    return Loader(dataset, batch_size, rank, world_size, seed, num_workers, strict, pin_memory, class_balanced)


class Format(NamedTuple):
    """How sets of one kind are told from others, and opened."""

    name: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, str, Optional[int]], ImageDataset]


def register(name: str, recognises: Callable[[Path], bool] = lambda path: False):
    """Enters a format of your own; decorates the function that opens it, docs/own_data.md has an example.

    The decorated is called with (path, channel_order, num_classes) and gives an `ImageDataset`; channel_order is "rgb"
    or "bgr", what the files hold, and num_classes None where it is to count. `--data_mode=name` asks for the format;
    without, it is taken for a path (file or folder) of which `recognises` is true, before the project's own formats.
    Raises DataError for a name that is taken.
    """

    def enter(open):
        if name in DATA_MODES or name == "synthetic" or any(one.name == name for one in FORMATS):
            raise DataError(f"data format {name!r}: there is one of this name already: choose another")
        FORMATS.insert(0, Format(name, recognises, open))
        return open

    return enter


def format_of(path) -> Optional[str]:
    """The name of the format that `open_dataset` would take `path` for; None for none."""
    return next((one.name for one in FORMATS if one.recognises(Path(path))), None)


def _find_folders(path: Path, data_mode: Optional[str]) -> list[Path]:
    if data_mode is None or not os.path.isdir(path):
        return [path]
    folders = [path / name for name in DATA_MODES.get(data_mode, (data_mode,))]
    missing = [folder for folder in folders if not os.path.exists(folder)]
    if not missing:
        return folders
    # the launchers are given the set's own folder, under a data_mode that only names its kind
    if len(folders) == 1 and (data_mode in DATA_MODES or path.name == data_mode):
        return [path]
    raise DataError(
        f"data_mode {data_mode!r}: {missing[0]} does not exist: choose from {', '.join(DATA_MODES)}, "
        f"synthetic, or the name of a folder in {path}"
    )


def _open_path(path: Path, channel_order: Optional[str], num_classes: Optional[int]) -> ImageDataset:
    for one in FORMATS:
        if one.recognises(path):
            return _open(one, path, channel_order, num_classes)
    raise DataError(
        f"{path}: holds no training set: train.rec, imgs/, label.txt, file_list.txt or class folders with "
        "images are looked for"
    )


def _open(one: Format, path: Path, channel_order: Optional[str], num_classes: Optional[int]) -> ImageDataset:
    recorded = recorded_channel_order(path)
    if one.name == "imgs":  # what prepare_data made, and recorded, inside a set's folder
        path = path / "imgs"
        recorded = recorded_channel_order(path) or recorded
    return one.open(path, channel_order or recorded or "rgb", num_classes)


# --- the formats that are here from the start -------------------------------------------------------------------------


def _is_recordio(path: Path) -> bool:
    return path.suffix == ".rec" if os.path.isfile(path) else bool(_records(path))


def _records(path: Path) -> list[Path]:
    try:
        names = sorted(name for name in os.listdir(path) if name.endswith(".rec"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return [path / name for name in (["train.rec"] if "train.rec" in names else names)]


def _open_recordio(path: Path, channel_order: str, num_classes: Optional[int]) -> ImageDataset:
    records = [path] if os.path.isfile(path) else _records(path)
    if len(records) > 1:
        raise DataError(f"{path}: holds {len(records)} .rec files and none is train.rec: name the one to train on")
    return RecordIODataset(records[0], channel_order, num_classes)


def _open_text(path: Path, channel_order: str, num_classes: Optional[int]) -> ImageDataset:
    """A list file: of images where its first line ends in a class, else of base64 part files."""
    try:
        with open_regular(path) as file:
            lines = (line for line in file.read(4096).splitlines() if line.strip() and not line.startswith(b"#"))
            fields = next(lines, b"").split()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(fields) > 1 and fields[-1].isdigit():
        return open_image_list(path, channel_order, num_classes)
    return Base64Dataset(path, channel_order, num_classes)


FORMATS = [
    Format("recordio", _is_recordio, _open_recordio),
    Format("list", os.path.isfile, _open_text),
    Format("imgs", lambda path: os.path.isdir(path / "imgs"), open_folder),
    Format(
        "label.txt",
        lambda path: os.path.isfile(path / "label.txt"),
        lambda path, *rest: open_image_list(path / "label.txt", *rest),
    ),
    Format(
        "file_list.txt",
        lambda path: os.path.isfile(path / "file_list.txt"),
        lambda path, *rest: Base64Dataset(path / "file_list.txt", *rest),
    ),
    Format("folders", has_class_folders, open_folder),
]
