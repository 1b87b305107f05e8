"""Images and label.txt as PLSC's readers give them: float32 [3, 112, 112], (x - 127.5) / 128, RGB."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from data.image_list import read_list
from data.images import decode_image, inside, read_file
from data.pairs import load_pairs
from plsc.environment import trainer
from runtime.errors import DamagedItem, DataError

DATA_DIM = 112
THREAD = 8
BUF_SIZE = 10240


def normalized(image_HWC: np.ndarray) -> np.ndarray:
    return ((image_HWC.astype(np.float32) - 127.5) / 128).transpose(2, 0, 1)


def get_train_image_list(data_dir) -> list[tuple[str, int]]:
    """This rank's (path, label): the list shuffled alike everywhere, filled up from its front, cut into even shares."""
    label_file = os.path.join(data_dir, "label.txt")
    items = list(read_list(label_file))
    if not items:
        raise DataError(f"{label_file}: lists no image")
    random.Random(0).shuffle(items)
    rank, ranks = trainer()
    share = -(-len(items) // ranks)
    while len(items) < share * ranks:
        items += items[: share * ranks - len(items)]
    return items[rank * share : (rank + 1) * share]


def arc_train(data_dir, class_dim: int):
    """A reader of the training images, shuffled and mirrored at random."""
    return arc_iterator(
        get_train_image_list(data_dir), class_dim, data_dir, shuffle=True, rand_mirror=True, normalize=True
    )


def arc_iterator(
    data, class_dim, data_dir, shuffle=False, color_jitter=False, rotate=False, rand_mirror=False, normalize=False
):
    """A reader of `data`, a list of (path, label): images made in THREAD threads."""
    missing = next((name for name, _label in data if not inside(Path(data_dir), name, "label.txt").is_file()), None)
    if missing is not None:
        raise DataError(f"{os.path.join(data_dir, 'label.txt')}: there is no image {missing}")
    make = partial(
        _sample, data_dir, class_dim, color_jitter, rotate, rand_mirror, normalized if normalize else _as_float
    )

    def reader() -> Iterator[tuple[np.ndarray, int]]:
        items = list(data)
        if shuffle:
            random.shuffle(items)
        with ThreadPoolExecutor(THREAD) as threads:
            for start in range(0, len(items), BUF_SIZE // 32):
                yield from threads.map(make, items[start : start + BUF_SIZE // 32])

    return reader


def _as_float(image_HWC: np.ndarray) -> np.ndarray:
    return image_HWC.astype(np.float32).transpose(2, 0, 1)


def _sample(data_dir, class_dim, color_jitter, rotate, rand_mirror, finish, item) -> tuple[np.ndarray, int]:
    name, label = item
    path = inside(Path(data_dir), name, "label.txt")
    if not 0 <= label < class_dim:
        raise DataError(f"{path}: label {label} is outside the {class_dim} classes: set_class_num gives their number")
    try:
        image_HWC = decode_image(read_file(path))
    except DamagedItem as error:
        raise DataError(f"{path}: {error}") from None
    if rotate or color_jitter:
        image = Image.fromarray(image_HWC)
        if rotate:
            image = _cropped(image.rotate(random.randint(-10, 10)))
        if color_jitter:
            for kind in random.sample((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), 3):
                image = kind(image).enhance(random.uniform(0.8, 1.2))
        image_HWC = np.asarray(image)
    if rand_mirror and random.random() < 0.5:
        image_HWC = image_HWC[:, ::-1]
    return finish(image_HWC), label


def _cropped(image: Image.Image) -> Image.Image:
    """A random part of 8 to 100 % of the area and a ratio of 3/4 to 4/3, in ten attempts, else all of it."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        ratio = random.uniform(3 / 4, 4 / 3)
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            image = image.crop((left, top, left + w, top + h))
            break
    return image.resize((DATA_DIM, DATA_DIM), Image.BILINEAR)


def load_bin(path, image_size):
    """([originals, mirrored], issame) of a verification .bin, each float32 [2N, 3, H, W] in the network's range."""
    size = image_size[0] if isinstance(image_size, (tuple, list)) else image_size
    images, issame = load_pairs(path, size=size)
    originals = np.stack([normalized(images[row]) for row in range(len(images))])
    return [originals, np.ascontiguousarray(originals[:, :, :, ::-1])], issame.tolist()


def test(data_dir, datasets: str):
    """(sets, names) of those verification sets, `lfw,cfp_fp`, which are in data_dir. DataError where one is missing."""
    names = [name.strip() for name in datasets.split(",") if name.strip()]
    paths = [Path(data_dir) / f"{name}.bin" for name in names]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such verification set: correct set_val_targets, or set_with_test(False)")
    return [load_bin(path, [DATA_DIM, DATA_DIM]) for path in paths], names
