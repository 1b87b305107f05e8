"""What the tests of `data` need beside tiny_set: odd images, hostile files, and functions for other processes."""

from __future__ import annotations

import hashlib
import io
import struct

import numpy as np
from PIL import Image

from data.recordio import RecordIOWriter


def encode(image_HWC, format: str = "JPEG", **options) -> bytes:
    """An array as an image file's bytes."""
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, format, **options)
    return out.getvalue()


def picture(seed: int, size: int = 112) -> np.ndarray:
    """uint8 [size, size, 3]: smooth colours, different for each seed."""
    cells = np.random.RandomState(seed).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(cells).resize((size, size), Image.BILINEAR))


def with_claimed_size(jpeg: bytes, width: int, height: int) -> bytes:
    """The same JPEG, its frame header claiming other dimensions."""
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def write_records(folder, payloads, keys=None):
    """folder/train.rec and train.idx with these payloads -> path of the .rec."""
    with RecordIOWriter(folder / "train.rec", folder / "train.idx") as writer:
        for key, payload in zip(range(len(payloads)) if keys is None else keys, payloads):
            writer.write(key, payload)
    return folder / "train.rec"


def digest(dataset) -> str:
    """A hash over every image and label; called in spawned processes."""
    state = hashlib.sha256()
    for index in range(len(dataset)):
        image_HWC, label = dataset[index]
        state.update(image_HWC.tobytes() + struct.pack("<q", label))
    return state.hexdigest()
