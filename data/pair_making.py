"""Verification sets from people: pairs of one person and pairs of two, equally many, chosen by a seed."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np

from data.folder import open_folder
from data.images import IMAGE_SUFFIXES, decode_image, inside, read_file
from data.pairs import write_bin
from data.parallel import ranges, spread
from runtime.errors import DamagedItem, DataError

FOLDS = 10  # of the protocol: contiguous, so each has to hold both kinds of pair

Pairs = list[tuple[Path, Path, bool]]


def pairs_of_folder(
    people, count: int, seed: int = 0, classes: Optional[list[int]] = None, folds: int = FOLDS
) -> Pairs:
    """`count` pairs of the images in a folder with one folder a person, half of them of the same person.

    As in LFW's protocol no person is in two folds, where there are enough people for that, and everybody is in about
    equally many pairs. classes: which of the people, by their place in the sorted names. Raises DataError where there
    are too few people or images for so many different pairs.
    """
    dataset = open_folder(people)
    if count < 2 or count % 2:
        raise DataError(f"--pairs {count}: must be even, half of the pairs show one person and half two")
    paths = [dataset.root / dataset._paths[row] for row in range(len(dataset))]
    by_person = [[] for _ in range(dataset.num_classes)]
    for path, label in zip(paths, dataset.labels.tolist()):
        by_person[label].append(path)
    people_left = [by_person[label] for label in (range(dataset.num_classes) if classes is None else classes)]
    source = random.Random(seed)
    source.shuffle(people_left)
    groups = [people_left[fold::folds] for fold in range(folds)]
    if not all(len(group) > 1 and any(len(images) > 1 for images in group) for group in groups):
        groups = [people_left] * folds  # too few people: they are in all folds
    share = [count // 2 // folds + (fold < count // 2 % folds) for fold in range(folds)]
    pairs, used = [], set()
    for group, each in zip(groups, share):
        pairs += _same(group, each, source, used, people) + _different(group, each, source, used, people)
    return pairs


def _same(group, count: int, source, used: set, place) -> Pairs:
    several = [images for images in group if len(images) > 1]
    source.shuffle(several)
    pairs, fruitless = [], 0
    while len(pairs) < count and fruitless < 20:
        before = len(pairs)
        for images in several[: count - len(pairs)]:
            pair = frozenset(source.sample(images, 2))
            if pair not in used:
                used.add(pair)
                pairs.append((*sorted(pair), True))
        several = several[count:] + several[:count]
        fruitless = 0 if len(pairs) > before else fruitless + 1
    if len(pairs) < count:
        raise DataError(f"{place}: too few people with several images for so many pairs: lower --pairs")
    return pairs


def _different(group, count: int, source, used: set, place) -> Pairs:
    pairs, tries = [], 0
    while len(group) > 1 and len(pairs) < count and tries < 20 * count + 100:
        first = group[tries % len(group)]
        second = group[(tries + source.randrange(1, len(group))) % len(group)]
        tries += 1
        pair = frozenset((source.choice(first), source.choice(second)))
        if pair not in used:
            used.add(pair)
            pairs.append((*sorted(pair), False))
    if len(pairs) < count:
        raise DataError(f"{place}: too few people for so many pairs of two: lower --pairs")
    return pairs


def pairs_of_list(list_path, people) -> Pairs:
    """The pairs of LFW's pairs.txt: `name n m` and `name n other m`, for images `name/name_0001.jpg`; or of lines
    `path path 0|1`. Raises DataError for a line that is neither, and for an image that is not there."""
    list_path, people = Path(list_path), Path(people)
    try:
        lines = list_path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{list_path}: cannot be read ({error})") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        fields, place = line.split(), f"{list_path} line {number}"
        if not fields or number == 1 and all(field.isdigit() for field in fields):
            continue  # LFW's first line: folds and pairs of a fold
        if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
            name, first, second = fields
            pairs.append((_find(people, name, first, place), _find(people, name, second, place), True))
        elif len(fields) == 4 and fields[1].isdigit() and fields[3].isdigit():
            images = _find(people, *fields[:2], place), _find(people, *fields[2:], place)
            pairs.append((*images, fields[0] == fields[2]))
        elif len(fields) == 3 and fields[2] in ("0", "1"):
            images = [inside(people, name, place) for name in fields[:2]]
            missing = next((path for path in images if not path.is_file()), None)
            if missing:
                raise DataError(f"{place}: there is no image {missing}")
            pairs.append((*images, fields[2] == "1"))
        else:
            raise DataError(f"{place}: {line[:60]!r} is no pair: 'name n m', 'name n other m' or 'path path 0|1'")
    if not pairs:
        raise DataError(f"{list_path}: names no pair")
    return pairs


def _find(people: Path, name: str, number: str, place: str) -> Path:
    stem = inside(people, f"{name}/{name}_{int(number):04d}", place)
    for suffix in IMAGE_SUFFIXES:
        if stem.with_suffix(suffix).is_file():
            return stem.with_suffix(suffix)
    raise DataError(f"{place}: there is no image {stem}{IMAGE_SUFFIXES[0]}")


def write_pairs(path, pairs: Pairs, workers: Optional[int] = None) -> None:
    """Writes the pairs as a verification .bin, each image looked at first; DataError for a damaged one, for one that is
    not 112x112, and where there is a file of this name."""
    if Path(path).exists():
        raise DataError(f"{path}: is there already: choose another name")
    files = [file for pair in pairs for file in pair[:2]]
    images = []
    for more in spread(partial(_read, files), ranges(len(files)), workers, Path(path).name, size=len):
        images += more
    write_bin(path, images, [same for _first, _second, same in pairs])


def _read(files: list[Path], rows: range) -> list[bytes]:
    images, out_HWC = [], np.empty((112, 112, 3), np.uint8)
    for row in rows:
        try:
            images.append(read_file(files[row]))
            decode_image(images[-1], out_HWC=out_HWC)
        except DamagedItem as error:
            raise DataError(f"{files[row]}: {error}") from None
    return images
