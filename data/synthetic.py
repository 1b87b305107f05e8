"""Faces that nobody has: images without a disk for speed tests, and synthetic faces for a first training."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Callable, Optional

import numpy as np

from data.dataset import ImageDataset
from data.faces import Identity, draw_face, draw_identity
from data.images import read_file
from data.pairs import write_bin
from data.recordio import RecordIOWriter, pack
from runtime.errors import DamagedItem, DataError
from runtime.files import temporary_path

log = logging.getLogger(__name__)

_STAMP = "synthetic.json"
_GENERATOR = 2  # raise it when the same arguments give other files
_NAMES = ("train.rec", "train.idx", "property", "synthetic.bin")
_MOST = 1 << 24  # of each number: a class is a float32 in a .rec
_FOLDS = 10  # of the verification protocol: contiguous, each with as many equal as different pairs
_TRAIN, _VERIFY, _PAIRS = range(3)  # the random streams of one seed


class SyntheticDataset(ImageDataset):
    """Images made in memory, for `--data_mode=synthetic`: measures everything but the disk and the decoder.

    Image i belongs to class i % num_classes: a coarse pattern of its class under noise, so a loss can fall.
    """

    _NOISES = 64  # the noise repeats: drawing it anew for each image would cost more than decoding a JPEG
    _CELLS = 7  # a class's pattern is 7 x 7 cells of one colour each
    _POOL = 1 << 20  # random bytes that the patterns are cut from

    def __init__(self, num_images: int, num_classes: int, size: int = 112, seed: int = 0):
        super().__init__(size)
        if num_images < 1 or num_classes < 1:
            raise DataError(f"a synthetic set of {num_images} images in {num_classes} classes: both must be at least 1")
        self.num_images, self.num_classes = num_images, num_classes
        random = np.random.RandomState(seed % 2**32)
        self._noise = random.randint(0, 128, (self._NOISES, size, size, 3)).astype(np.uint8)
        self._pool = np.frombuffer(random.bytes(self._POOL), np.uint8) // 2
        self._cell_of = np.arange(size) * self._CELLS // size

    def __len__(self) -> int:
        return self.num_images

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.num_images) % self.num_classes

    def describe(self, index: int) -> str:
        return f"synthetic image {index}"

    def load_into(self, index: int, out_HWC: np.ndarray) -> int:
        label = index % self.num_classes
        count = self._CELLS * self._CELLS * 3
        begin = label * count % (self._POOL - count)
        cells = self._pool[begin : begin + count].reshape(self._CELLS, self._CELLS, 3)
        cells[:, self._cell_of].take(self._cell_of, axis=0, out=out_HWC, mode="clip")
        out_HWC += self._noise[index % self._NOISES]
        return label


def _person(seed: int, stream: int, number: int) -> Identity:
    return draw_identity(np.random.RandomState([seed, stream, number]))


def _jpeg(person: Identity, seed: int, stream: int, number: int, image: int, size: int) -> bytes:
    random = np.random.RandomState([seed, stream, number, image])
    out = io.BytesIO()
    draw_face(person, random, size).save(out, "JPEG", quality=int(random.randint(50, 96)))
    return out.getvalue()


def write_training_set(
    folder,
    identities: int,
    images_per_identity: int,
    seed: int,
    size: int = 112,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """train.rec, train.idx and property of synthetic faces in InsightFace's layout; `tick` is called once an image."""
    folder, images = Path(folder), identities * images_per_identity
    with RecordIOWriter(folder / "train.rec", folder / "train.idx") as writer:
        writer.write(0, pack([images + 1, images + 1 + identities]))
        for number in range(identities):
            person = _person(seed, _TRAIN, number)
            for image in range(images_per_identity):
                key = 1 + number * images_per_identity + image
                writer.write(key, pack(number, _jpeg(person, seed, _TRAIN, number, image, size), key))
                tick()
        for number in range(identities):
            first = 1 + number * images_per_identity
            key = images + 1 + number
            writer.write(key, pack([first, first + images_per_identity], key=key))
    (folder / "property").write_text(f"{identities},{size},{size}")


def write_verification_set(
    path,
    identities: int,
    images_per_identity: int,
    pairs: int,
    seed: int,
    size: int = 112,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """A verification .bin of synthetic people who are in no training set of this seed, in ten folds."""
    random = np.random.RandomState([seed, _PAIRS])
    faces = []
    for number in range(identities):
        person = _person(seed, _VERIFY, number)
        faces.append([])
        for image in range(images_per_identity):
            faces[-1].append(_jpeg(person, seed, _VERIFY, number, image, size))
            tick()
    images, issame = [], []
    per_fold = pairs // _FOLDS
    for pair in range(per_fold * _FOLDS):
        same = pair % per_fold < per_fold // 2
        if same:
            one = two = random.randint(identities)
            first, second = random.permutation(images_per_identity)[:2]
        else:
            one, two = random.permutation(identities)[:2]
            first, second = random.randint(0, images_per_identity, 2)
        images += [faces[one][first], faces[two][second]]
        issame.append(same)
    write_bin(path, images, issame)


def generate(
    output,
    identities: int = 40,
    images_per_identity: int = 40,
    verify_identities: int = 40,
    verify_images: int = 10,
    pairs: int = 600,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> bool:
    """Write train.rec, train.idx, property and synthetic.bin into folder `output`; False if they are already there.

    Everything is written aside and moved in when whole. A folder with someone else's data is refused.
    """
    numbers = (identities, images_per_identity, verify_identities, verify_images, pairs)
    if max(numbers) > _MOST or identities * images_per_identity > _MOST:
        raise DataError(f"a synthetic set of more than {_MOST:,} images, identities or pairs: choose a smaller one")
    if not 0 <= seed < 1 << 32:
        raise DataError(f"--seed {seed}: choose one from 0 to {(1 << 32) - 1}")
    if min(identities, verify_identities, verify_images) < 2 or images_per_identity < 1 or pairs < 2 * _FOLDS:
        raise DataError(
            f"a synthetic set needs at least 2 identities, 2 verification identities of 2 images, 1 image "
            f"for each identity and {2 * _FOLDS} pairs"
        )
    output = Path(output)
    wanted = {
        "generator": _GENERATOR,
        "identities": identities,
        "images_per_identity": images_per_identity,
        "verify_identities": verify_identities,
        "verify_images": verify_images,
        "pairs": pairs,
        "seed": seed,
    }
    present = _read_stamp(output)
    if present == wanted:
        return False
    if present is None and any(os.path.exists(output / name) for name in (*_NAMES, _STAMP)):
        raise DataError(f"{output}: holds a data set which was not made here: choose another folder")
    partial, new = temporary_path(output / "set"), not os.path.exists(output)
    try:
        partial.mkdir(parents=True)
        write_training_set(partial, identities, images_per_identity, seed, tick=tick)
        write_verification_set(partial / "synthetic.bin", verify_identities, verify_images, pairs, seed, tick=tick)
        # From here to the last line the folder holds old and new files: the stamp says so.
        (output / _STAMP).write_text(json.dumps({"unfinished": True}))
        for name in _NAMES:
            os.replace(partial / name, output / name)
        (partial / _STAMP).write_text(json.dumps(wanted))
        os.replace(partial / _STAMP, output / _STAMP)
        if present and present.get("generator") == 1:  # which called its pairs lfw
            (output / "lfw.bin").unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{output}: cannot be written ({error.strerror}): free some space or choose another folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if new and os.path.isdir(output) and not any(output.iterdir()):
            output.rmdir()
    return True


def _read_stamp(output: Path) -> Optional[dict]:
    try:
        stamp = json.loads(read_file(output / _STAMP, 1 << 16))
    except (DamagedItem, ValueError, RecursionError):
        return None
    return stamp if isinstance(stamp, dict) and stamp.keys() & {"generator", "unfinished"} else None


def main() -> None:
    """Command line: python -m data.synthetic --output DIR."""
    from runtime.log import Parser

    parser = Parser(
        prog="python -m data.synthetic",
        description="Make a training set of synthetic faces, and pairs of other ones to verify on.",
    )
    parser.add_argument("--output", required=True, help="folder for train.rec, train.idx, property and synthetic.bin")
    parser.add_argument("--identities", type=int, default=40)
    parser.add_argument("--images_per_identity", type=int, default=40)
    parser.add_argument("--verify_identities", type=int, default=40, help="other people, for synthetic.bin")
    parser.add_argument("--verify_images", type=int, default=10, help="images of each of them")
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.output:
        raise DataError("--output is empty: name a folder (is a variable of your shell not set?)")
    from tqdm import tqdm

    total = max(0, args.identities * args.images_per_identity + args.verify_identities * args.verify_images)
    with tqdm(total=total, unit="image", desc="synthetic faces", disable=None) as bar:
        made = generate(**vars(args), tick=bar.update)
    print(f"{args.output}: {'written' if made else 'already there, nothing to do'}")


if __name__ == "__main__":
    from runtime.log import run_command

    run_command(main)
