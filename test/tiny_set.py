"""A training set of a few coloured squares in InsightFace's layout, small enough to train on in seconds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data.pairs import write_bin
from data.recordio import RecordIOWriter, pack


def jpeg(identity: int, shot: int, size: int = 112) -> bytes:
    """One image: a pattern that belongs to the identity under noise that belongs to the shot."""
    pattern = np.random.RandomState(identity).randint(40, 216, (4, 4, 3)).repeat(size // 4, 0).repeat(size // 4, 1)
    noise = np.random.RandomState(1000 + 97 * identity + shot).randint(-40, 41, (size, size, 3))
    buffer = io.BytesIO()
    Image.fromarray((pattern + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_tiny_set(folder, classes: int = 4, shots: int = 5, pairs: int = 10) -> Path:
    """train.rec, train.idx, property (classes x shots images) and lfw.bin (pairs of ten other identities)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with RecordIOWriter(folder / "train.rec", folder / "train.idx") as writer:
        count = classes * shots
        writer.write(0, pack([count + 1, count + classes + 1]))
        for key in range(1, count + 1):
            writer.write(key, pack((key - 1) // shots, jpeg((key - 1) // shots, (key - 1) % shots), key))
        for label in range(classes):
            writer.write(count + 1 + label, pack([1 + label * shots, 1 + (label + 1) * shots]))
    (folder / "property").write_text(f"{classes},112,112\n")
    images, same = [], []
    for pair in range(pairs):
        other = 100 + pair % 10
        same.append(pair % 2 == 0)
        images += [jpeg(other, 2 * pair), jpeg(other if same[-1] else other + 1, 2 * pair + 1)]
    write_bin(folder / "lfw.bin", images, same)
    return folder
