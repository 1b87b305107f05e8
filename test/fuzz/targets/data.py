"""Training sets, verification sets and images."""

from __future__ import annotations

import io
import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from run import target


@cache
def image(number: int, format: str = "JPEG", mode: str = "RGB", size: int = 112, **options) -> bytes:
    """A flat picture with one other corner: about a kilobyte as a JPEG."""
    picture = Image.new("RGB", (size, size), (40 * number % 256, 90, 200 - 30 * number % 200))
    picture.paste((250, 250, 20), (0, 0, 24, 24))
    out = io.BytesIO()
    picture.convert(mode).save(out, format, **options)
    return out.getvalue()


def files_of(folder) -> dict:
    """What lies in a folder, as a sample."""
    folder = Path(folder)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def written(write) -> dict:
    """The files that `write(folder)` leaves, as a sample."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return files_of(folder)


def use(dataset) -> None:
    """Everything that training asks of a set, of a few images."""
    from runtime.errors import DamagedItem

    assert len(dataset.labels) == len(dataset) > 0 and dataset.labels.max() < dataset.num_classes
    for index in {0, 1, len(dataset) // 2, len(dataset) - 1}:
        if index < len(dataset):
            try:
                image_HWC, label = dataset[index]
                assert image_HWC.shape == (112, 112, 3) and 0 <= label < dataset.num_classes
            except DamagedItem as damage:
                assert len(str(damage)) <= 300  # a loader replaces such an image and says this


# --- training sets ---------------------------------------------------------------------------------------------------


def _records() -> list:
    from data.recordio import RecordIOWriter, pack

    def insightface(folder):
        with RecordIOWriter(folder / "train.rec", folder / "train.idx") as writer:
            writer.write(0, pack([5, 7]))
            for key in range(1, 5):
                label = (key - 1) // 2
                writer.write(key, pack([label, 0.0] if key == 2 else label, image(key), key))
            writer.write(5, pack([1, 3]))
            writer.write(6, pack([3, 5]))
        (folder / "property").write_text("2,112,112\n")

    def plain(folder):
        with RecordIOWriter(folder / "train.rec", folder / "train.idx") as writer:
            for key in range(3):
                # the second record is split at the magic word that it holds
                rest = b"\x0a\x23\xd7\xce" * 2 if key == 1 else b""
                writer.write(7 - key, pack(key, image(key) + rest, key))

    with_index, without = written(insightface), written(plain)
    return [with_index, without, {"train.rec": without["train.rec"]}]


@target(_records)
def recordio(folder):
    from data import open_dataset

    use(open_dataset(folder))


def _lists() -> list:
    from data import kv_bin

    images = {f"a b/{i}.jpg": image(i) for i in range(3)}
    lines = "".join(f"a b/{i}.jpg {i}\n" for i in range(3))
    bins = {f"bins/{i}.bin": kv_bin.build(f"{i}.jpg", image(i)) for i in range(2)}
    return [
        {**images, "label.txt": lines.encode(), "label_channel_order.txt": b"bgr\n"},
        {**bins, "label.txt": b"# path label\nbins/0.bin\t0\nbins/1.bin\t1\n"},
    ]


@target(_lists)
def image_list(folder):
    from data import open_dataset

    use(open_dataset(folder))


def _kv() -> list:
    from data import kv_bin

    return [{"a.bin": kv_bin.build("a.jpg", b"\xff\xd8 the bytes of an image")}]


@target(_kv)
def kv_bin(folder):
    from data import kv_bin

    kv_bin.bin_to_image(folder / "a.bin", folder / "a.jpg")


def _base64() -> list:
    import base64

    parts = [b"".join(base64.b64encode(image(i, quality=20)) + b"\t%d\n" % i for i in (n, n + 1)) for n in (0, 2)]
    reverse = b"".join(b"%d\t%s\n" % (i, base64.b64encode(image(i, quality=20))) for i in range(2))
    return [
        {"file_list.txt": b"part_0\nparts/part_1\n", "part_0": parts[0], "parts/part_1": parts[1]},
        {"file_list.txt": b"part_0\n", "part_0": reverse},
    ]


@target(_base64)
def base64_list(folder):
    from data import open_dataset

    use(open_dataset(folder))


def _folders() -> list:
    return [
        {f"imgs/{label}/{i}.jpg": image(i) for label in ("0", "10", "2") for i in range(2)},
        {**{f"{name}/{i}.png": image(i, "PNG") for name in ("Ann", "Bo") for i in range(2)}, "Ann/sub/x.jpg": image(5)},
    ]


@target(_folders)
def image_folder(folder):
    from data import open_dataset

    use(open_dataset(folder))


# --- images ----------------------------------------------------------------------------------------------------------


def _grey16(size: int = 112) -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, size * size).astype(np.uint16).reshape(size, size))


def _images() -> list:
    kinds = [image(1), image(2, progressive=True), image(3, mode="L"), image(4, mode="CMYK")]
    kinds += [image(5, "PNG"), image(6, "PNG", mode="RGBA"), image(7, "PNG", mode="P"), image(8, "PNG", mode="1")]
    kinds += [image(9, format) for format in ("BMP", "PPM", "TIFF", "WEBP")]
    for format in ("PNG", "TIFF"):
        out = io.BytesIO()
        _grey16().save(out, format)
        kinds.append(out.getvalue())
    return [{"image": data} for data in kinds]


@target(_images)
def images(folder):
    from data.images import decode_image, read_file

    decode_image(read_file(folder / "image"), "bgr", np.empty((112, 112, 3), np.uint8))


@target(_images)
def images_of_any_size(folder):
    from data.images import MAX_PIXELS, decode_image, read_file

    image_HWC = decode_image(read_file(folder / "image"))
    assert image_HWC.ndim == 3 and image_HWC.dtype == np.uint8 and image_HWC.size <= 3 * MAX_PIXELS


# --- pairs -----------------------------------------------------------------------------------------------------------


def _use_pairs(path) -> None:
    from data.pairs import load_pairs

    images, issame = load_pairs(path)
    assert len(images) == 2 * len(issame) > 0 and issame.dtype == bool
    assert images[0].shape == images[len(images) - 1].shape == (112, 112, 3)


def _bins() -> list:
    import pickle

    def arrays(code):
        data = pickle.dumps(
            ([np.frombuffer(image(i, quality=10), np.uint8) for i in range(4)], [True, np.bool_(False)]), code
        )
        return data

    plain = ([image(i, quality=10) for i in range(4)], [True, False])
    return [{"lfw.bin": data} for data in (pickle.dumps(plain, 2), pickle.dumps(plain, 4), arrays(2), arrays(5))]


@target(_bins)
def pairs_bin(folder):
    _use_pairs(folder / "lfw.bin")


@cache
def _bcolz_sample() -> dict:
    import bcolz

    def write(folder):
        array = bcolz.fill((4, 3, 112, 112), dtype=np.float32, rootdir=str(folder / "lfw"), mode="w", chunklen=2)
        array[:] = np.linspace(-1, 1, 112, dtype=np.float32)
        array.flush()
        np.save(folder / "lfw_list.npy", np.array([True, False]))

    return written(write)


@target(lambda: [_bcolz_sample()], prepare=lambda: __import__("bcolz"))
def pairs_bcolz(folder):
    _use_pairs(folder / "lfw")


def _pair_folders() -> list:
    files = {f"lfw/p {i // 2}/{i % 2}.jpg": image(i) for i in range(4)}
    return [{**files, "lfw/label.txt": b"p 0 True\np 1\tFalse\n", "lfw_channel_order.txt": b"rgb\n"}]


@target(_pair_folders)
def pairs_folder(folder):
    _use_pairs(folder / "lfw")


def _embeddings() -> list:
    rows = np.eye(20, 8, dtype=np.float32) + np.eye(20, 8, -8, dtype=np.float32) + np.eye(20, 8, -16, dtype=np.float32)
    out = io.BytesIO()
    np.save(out, rows)
    return [{"embeddings.npy": out.getvalue(), "same.json": json.dumps([True, False] * 5).encode()}]


@target(_embeddings)
def protocol(folder):
    """Not a file format: what a model puts out and a set says, through a file so that it can be mutated."""
    from verify.protocol import evaluate_pairs

    if not all((folder / name).is_file() for name in ("embeddings.npy", "same.json")):
        return
    try:
        rows, same = np.load(folder / "embeddings.npy"), json.loads((folder / "same.json").read_text())
    except Exception:
        return
    result = evaluate_pairs(rows, same)
    assert 0 <= result.accuracy <= 1
