"""One format of a training or verification set into another, the images' bytes unchanged.

Every function works on all cores, can be interrupted and called again, and replaces no file that holds something else.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

from data import kv_bin
from data.folder import open_folder
from data.image_list import write_list
from data.images import IMAGE_SUFFIXES, decode_image, image_size, read_file
from data.insightface import RecordIODataset
from data.pairs import VERIFICATION_SETS, load_pairs
from data.parallel import ranges, spread
from data.recordio import RecordIOWriter, pack
from runtime.errors import DamagedItem, DataError
from runtime.files import atomic_file, write_text

MAX_KEY = 5000  # bytes of a kv .bin's key, as arcface_paddle bounds it
_MAGICS = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"BM", ".bmp"), (b"RIFF", ".webp"))


def image_suffix(data) -> str:
    """.jpg, .png, .bmp or .webp, by an encoded image's first bytes."""
    return next((suffix for magic, suffix in _MAGICS if bytes(data[:4]).startswith(magic)), ".jpg")


def write_once(path: Path, data: bytes) -> None:
    """Writes a file whole, or finds it there with these bytes; DataError where it holds others."""
    if path.exists():
        if path.stat().st_size != len(data) or path.read_bytes() != data:
            raise DataError(f"{path}: is there and holds something else: choose another output folder")
        return
    with atomic_file(path, DataError) as file:
        file.write(data)


def make_folder(path) -> Path:
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be made ({error.strerror})") from None
    return path


# --- train.rec to images and label.txt --------------------------------------------------------------------------------


def recordio_to_list(rec_path, folder, workers: Optional[int] = None) -> tuple[int, int, list[str]]:
    """`folder/images/%08d.jpg` by record key, and label.txt -> (images, classes, a line for each damaged record).

    A damaged record is left out of label.txt. Raises DataError for a set that cannot be read or a file in the way.
    """
    dataset = RecordIODataset(rec_path)
    make_folder(Path(folder) / "images")
    found = spread(partial(_unpack, dataset, Path(folder)), ranges(len(dataset)), workers, "images", size=len)
    rows, damaged = [], []
    for more, problems in found:
        rows += more
        damaged += problems
    write_list(Path(folder) / "label.txt", rows)
    return len(rows), dataset.num_classes, damaged


def _unpack(dataset: RecordIODataset, folder: Path, rows: range) -> tuple[list, list]:
    written, damaged = [], []
    for row in rows:
        try:
            data, label = dataset.encoded(row)
            decode_image(data, out_HWC=np.empty((*dataset.size, 3), np.uint8))
        except DamagedItem as error:
            damaged.append(f"{dataset.describe(row)}: {error}")
            continue
        name = f"images/{dataset.key(row):08d}{image_suffix(data)}"
        write_once(folder / name, bytes(data))
        written.append((name, label))
    return written, damaged


def copy_pair_sets(source, target) -> list[str]:
    """Copies every known verification .bin that stands in `source`; their names."""
    copied = []
    for name in VERIFICATION_SETS:
        path = Path(source) / f"{name}.bin"
        if path.is_file():
            write_once(Path(target) / path.name, path.read_bytes())
            copied.append(name)
    return copied


# --- images to kv .bin and back ---------------------------------------------------------------------------------------


def images_to_bins(images, bins, workers: Optional[int] = None) -> int:
    """Every image directly in folder `images` as `bins/<stem>.bin`; how many. DataError where two have one stem."""
    names = _names(images, IMAGE_SUFFIXES, "image")
    stems = [os.path.splitext(name)[0] for name in names]
    twice = next((name for name, before in zip(stems[1:], stems) if name == before), None)
    if twice:
        raise DataError(f"{images}: holds two images called {twice}, and {twice}.bin would be both: rename one")
    make_folder(bins)
    return sum(spread(partial(_to_bin, Path(images), Path(bins), names), ranges(len(names)), workers, "bins", size=len))


def bins_to_images(bins, images, workers: Optional[int] = None) -> int:
    """Every kv .bin directly in folder `bins` as the image that went into it, its suffix from its key; how many."""
    names = _names(bins, (".bin",), ".bin file")
    make_folder(images)
    jobs = ranges(len(names))
    return sum(spread(partial(_to_image, Path(bins), Path(images), names), jobs, workers, "images", size=len))


def _names(folder, suffixes: tuple, what: str) -> list[str]:
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(suffixes))
    if not names:
        raise DataError(f"{folder}: holds no {what}")
    return names


def _to_bin(images: Path, bins: Path, names: list[str], rows: range) -> int:
    for row in rows:
        name = names[row]
        if len(os.fsencode(name)) > MAX_KEY:
            raise DataError(f"{images / name}: a name of more than {MAX_KEY} bytes: rename it")
        try:
            data = read_file(images / name)
            image_size(data)
        except DamagedItem as error:
            raise DataError(f"{images / name}: {error}") from None
        write_once(bins / f"{os.path.splitext(name)[0]}.bin", kv_bin.build(name, data))
    return len(rows)


def _to_image(bins: Path, images: Path, names: list[str], rows: range) -> int:
    for row in rows:
        path = bins / names[row]
        try:
            key, data = kv_bin.parse(read_file(path))
            image_size(data)
        except DamagedItem as error:
            raise DataError(f"{path}: {error}") from None
        suffix = os.path.splitext(key)[1]  # the key itself is a file's word, and may lead anywhere
        suffix = suffix if suffix.lower() in IMAGE_SUFFIXES else image_suffix(data)
        write_once(images / (path.stem + suffix), data)
    return len(rows)


# --- a verification .bin to a folder of PNGs --------------------------------------------------------------------------


def pairs_to_folder(bin_path, folder, flips: bool = False, workers: Optional[int] = None) -> int:
    """`images/%08d_0.png` and `_1.png` of each pair and label.txt `a<TAB>b<TAB>0 or 1`; how many lines.

    PNG keeps every pixel. flips: the mirrored images too, as `_hflip`, in lines after all others.
    """
    images, issame = load_pairs(bin_path)
    make_folder(Path(folder) / "images")
    jobs = ranges(len(issame))
    for _ in spread(partial(_write_pngs, images, Path(folder) / "images", flips), jobs, workers, "pairs", "pair", len):
        pass
    lines = [
        f"images/{pair:08d}_0{end}.png\timages/{pair:08d}_1{end}.png\t{int(same)}\n"
        for end in ("", "_hflip")[: 1 + flips]
        for pair, same in enumerate(issame)
    ]
    write_text(Path(folder) / "label.txt", "".join(lines), DataError)
    return len(lines)


def _write_pngs(images, folder: Path, flips: bool, pairs: range) -> None:
    import io

    for pair in pairs:
        for side in (0, 1):
            pixels_HWC = images[2 * pair + side]
            for end, view in (("", pixels_HWC), ("_hflip", pixels_HWC[:, ::-1]))[: 1 + flips]:
                file = io.BytesIO()
                Image.fromarray(np.ascontiguousarray(view)).save(file, "PNG")
                write_once(folder / f"{pair:08d}_{side}{end}.png", file.getvalue())


# --- a folder of people to train.rec ----------------------------------------------------------------------------------


def folder_to_recordio(people, folder, classes: Optional[list[int]] = None, workers: Optional[int] = None) -> int:
    """train.rec, train.idx and property in InsightFace's layout, from a folder with a folder a person; how many images.

    classes: which of the people, by their place in the sorted names (None: all); they get the labels 0, 1, 2 ...
    Raises DataError for an image that is damaged or not 112x112, and where train.rec is there already.
    """
    folder, dataset = make_folder(folder), open_folder(people)
    if (folder / "train.rec").exists():
        raise DataError(f"{folder / 'train.rec'}: is there already: choose another output folder")
    if shutil.disk_usage(folder).free < sum(
        (dataset.root / dataset._paths[i]).stat().st_size for i in range(len(dataset))
    ):
        raise DataError(f"{folder}: too little space on this disk for the set: free some")
    labels = dataset.labels
    chosen = np.arange(dataset.num_classes) if classes is None else np.array(sorted(classes))
    place = np.full(dataset.num_classes, -1)
    place[chosen] = np.arange(len(chosen))
    rows = [row for row in range(len(dataset)) if place[labels[row]] >= 0]
    counts = np.bincount(place[labels[rows]], minlength=len(chosen))
    with RecordIOWriter(folder / "train.rec", folder / "train.idx") as writer:
        stop = len(rows) + 1
        writer.write(0, pack([stop, stop + len(chosen)]))
        key = 1
        jobs = [rows[piece.start : piece.stop] for piece in ranges(len(rows))]
        for images in spread(partial(_read_whole, dataset), jobs, workers, "train.rec", size=len):
            for data in images:
                writer.write(key, pack(float(place[labels[rows[key - 1]]]), data, key))
                key += 1
        ends = 1 + np.cumsum(counts)
        for label, (end, count) in enumerate(zip(ends.tolist(), counts.tolist())):
            writer.write(stop + label, pack([end - count, end]))
    write_text(folder / "property", f"{len(chosen)},112,112\n", DataError)
    return len(rows)


def _read_whole(dataset, rows: list[int]) -> list[bytes]:
    images, out_HWC = [], np.empty((*dataset.size, 3), np.uint8)
    for row in rows:
        dataset.load_into(row, out_HWC)
        images.append(bytes(dataset.encoded(row)[0]))
    return images
