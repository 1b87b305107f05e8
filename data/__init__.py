"""Training sets and verification sets, whatever their format: `open_dataset`, `build_loader`, `data.pairs.load_pairs`.

Everything that leaves this package is RGB and uint8; data.transforms.to_input makes it the network's input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from data.base64_reader import Base64Dataset
from data.dataset import ConcatDataset, ImageDataset
from data.folder import has_class_folders, open_folder
from data.image_list import open_image_list
from data.images import recorded_channel_order
from data.insightface import RecordIODataset
from runtime.errors import DamagedItem, DataError

__all__ = ["DATA_MODES", "DamagedItem", "DataError", "ImageDataset", "build_loader", "open_dataset"]

# The lineage's names of sets, and the folders beneath the data path that they stand for.
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
    data_mode: vgg, ms1m, emore, concat (ms1m's classes, then vgg's), a folder's name, or synthetic (no path is read).
    channel_order: what the files hold, "rgb" or "bgr"; None takes what was recorded beside the files, else "rgb".
    num_classes: None counts them.
    Raises DataError, one line.
    """
    if num_classes is not None and num_classes < 1:
        raise DataError(f"num_classes {num_classes}: it must be at least 1")
    if data_mode == "synthetic":
        from data.synthetic import SyntheticDataset  # here, because python -m data.synthetic runs that module itself

        return SyntheticDataset(_EMORE[0], num_classes or _EMORE[1])
    folders = _find_folders(Path(path), data_mode)
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
):
    """A `data.loader.Loader` over one rank's share of a set: see there."""
    from data.loader import Loader  # loads torch, which the readers do without

    return Loader(dataset, batch_size, rank, world_size, seed, num_workers, strict, pin_memory)


def _find_folders(path: Path, data_mode: Optional[str]) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder: give the data set's folder as --data_path")
    if data_mode is None or path.is_file():
        return [path]
    folders = [path / name for name in DATA_MODES.get(data_mode, (data_mode,))]
    missing = [folder for folder in folders if not folder.exists()]
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
    order = channel_order or recorded_channel_order(path) or "rgb"
    if path.is_file():
        if path.suffix == ".rec":
            return RecordIODataset(path, order, num_classes)
        return _open_text(path, order, num_classes)
    records = [path / "train.rec"] if (path / "train.rec").exists() else sorted(path.glob("*.rec"))
    if len(records) > 1:
        raise DataError(f"{path}: holds {len(records)} .rec files and none is train.rec: name the one to train on")
    if records:
        return RecordIODataset(records[0], order, num_classes)
    if (path / "imgs").is_dir():
        order = channel_order or recorded_channel_order(path / "imgs") or "rgb"
        return open_folder(path / "imgs", order, num_classes)
    if (path / "label.txt").is_file():
        return open_image_list(path / "label.txt", order, num_classes)
    if (path / "file_list.txt").is_file():
        return Base64Dataset(path / "file_list.txt", order, num_classes)
    if has_class_folders(path):
        return open_folder(path, order, num_classes)
    raise DataError(
        f"{path}: holds no training set: train.rec, imgs/, label.txt, file_list.txt or class folders with "
        "images are looked for"
    )


def _open_text(path: Path, channel_order: str, num_classes: Optional[int]) -> ImageDataset:
    """A list file: of images where its first line ends in a class, else of base64 part files."""
    with open(path, "rb") as file:
        lines = (line for line in file.read(4096).splitlines() if line.strip() and not line.startswith(b"#"))
        fields = next(lines, b"").split()
    if len(fields) > 1 and fields[-1].isdigit():
        return open_image_list(path, channel_order, num_classes)
    return Base64Dataset(path, channel_order, num_classes)
