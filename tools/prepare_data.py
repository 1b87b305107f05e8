"""Unpack InsightFace's files as InsightFace_Pytorch does: train.rec to imgs/, verification .bin to bcolz arrays.

python -m tools.prepare_data --rec_path data/faces_emore

Training reads train.rec directly and faster; this is for those who want the images as files, or want the layout of
the older project. Unlike its own tool the images keep their bytes and all channels are RGB, which is recorded in
`imgs_channel_order.txt` and `<set>_channel_order.txt`. An interrupted run is continued where it stopped; a folder
that this command did not make is left alone.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Optional

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python tools/prepare_data.py

from data.convert import image_suffix
from data.images import channel_order_path
from data.insightface import RecordIODataset
from data.pairs import VERIFICATION_SETS, load_pairs
from runtime.errors import DamagedItem, DataError, printable
from runtime.files import atomic_file, temporary_path, write_text
from runtime.log import Parser, run_command

_MARK = ".made_by_prepare_data"  # inside every folder that is made here


def _is_ours(folder: Path) -> bool:
    """Whether a folder is there and was made here; DataError where something else stands in its place."""
    if not os.path.lexists(folder):
        return False
    if not (folder / _MARK).is_file():
        raise DataError(
            f"{folder}: is there and was not made by this command: move it away, or choose another --output"
        )
    return True


def unpack_images(rec_path: Path, folder: Path) -> tuple[int, int]:
    """Write `folder/<class>/<key>.jpg` for every record of `rec_path`, bytes unchanged -> (written, damaged).

    Files that are there with the right size stay. Raises DataError if the set cannot be read or the disk is full.
    """
    dataset = RecordIODataset(rec_path)
    if not _is_ours(folder):
        folder.mkdir(parents=True)
        (folder / _MARK).touch()
        write_text(channel_order_path(folder), "rgb\n", DataError)
    written, damaged = 0, 0
    for index in tqdm(range(len(dataset)), desc=f"{rec_path.name} to {folder.name}", unit="image", disable=None):
        try:
            data, label = dataset.encoded(index)
        except DamagedItem as error:
            tqdm.write(printable(f"skipped {dataset.describe(index)}: {error}"))
            damaged += 1
            continue
        if label < 0:
            raise DataError(f"{dataset.describe(index)}: label {label} is no class: the file is damaged")
        path = folder / str(label) / f"{dataset.key(index)}{image_suffix(data)}"
        if path.is_file() and path.stat().st_size == len(data):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, DataError) as file:
            file.write(data)
        written += 1
    return written, damaged


def unpack_pairs(bin_path: Path, folder: Path) -> bool:
    """Write a verification .bin as the bcolz array `folder` and `<folder>_list.npy`; False if they are there.

    Raises DataError for a bad .bin, or where bcolz is not installed.
    """
    answers = folder.with_name(folder.name + "_list.npy")
    if answers.is_file() and (folder / "meta" / "sizes").is_file():
        return False  # the list is written last
    if answers.exists():
        raise DataError(f"{answers}: is there without {folder}: move it away, or choose another --output")
    try:
        import bcolz
    except ImportError:
        raise DataError(
            f"{bin_path}: writing bcolz arrays needs the package bcolz-zipline: pip install it, or leave "
            "the .bin as it is (verification reads it)"
        ) from None
    images, issame = load_pairs(bin_path)
    interrupted = _is_ours(folder)
    partial = temporary_path(folder)
    height, width = images.size
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        array = bcolz.fill((len(images), 3, height, width), dtype=np.float32, rootdir=str(partial), mode="w")
        for row in tqdm(range(len(images)), desc=f"{bin_path.name} to {folder.name}", unit="image", disable=None):
            array[row] = (images[row].transpose(2, 0, 1).astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
        array.flush()
        (partial / _MARK).touch()
        if interrupted:
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    write_text(channel_order_path(folder), "rgb\n", DataError)
    with atomic_file(answers, DataError) as file:
        np.save(file, issame)
    return True


def prepare(rec_path: Path, output: Optional[Path] = None) -> list[str]:
    """Unpack everything found in folder `rec_path` into `output` (None: itself) -> one line for each thing done."""
    if not rec_path.is_dir() and (Path("data") / rec_path).is_dir():
        rec_path = Path("data") / rec_path  # InsightFace_Pytorch names folders beneath data/
    if not rec_path.is_dir():
        raise DataError(f"{rec_path}: no such folder: give the one that holds train.rec as --rec_path")
    output = output or rec_path
    done = []
    try:
        if (rec_path / "train.rec").is_file():
            written, damaged = unpack_images(rec_path / "train.rec", output / "imgs")
            done.append(f"imgs: {written} images written, {damaged} damaged")
        for name in VERIFICATION_SETS:
            if (rec_path / f"{name}.bin").is_file():
                made = unpack_pairs(rec_path / f"{name}.bin", output / name)
                done.append(f"{name}: {'written' if made else 'already there'}")
    except OSError as error:
        raise DataError(
            f"{output}: cannot be written ({error.strerror}): free some space and run this again, it "
            "continues where it stopped"
        ) from None
    if not done:
        raise DataError(f"{rec_path}: holds neither train.rec nor a verification .bin")
    return done


def main() -> None:
    parser = Parser(prog="python -m tools.prepare_data", description=__doc__.splitlines()[0])
    parser.add_argument("-r", "--rec_path", default="faces_emore", help="folder with train.rec, train.idx and .bin")
    parser.add_argument("--output", default=None, help="where to write; the same folder by default")
    args = parser.parse_args()
    for line in prepare(Path(args.rec_path), Path(args.output) if args.output else None):
        print(line)


if __name__ == "__main__":
    run_command(main)
