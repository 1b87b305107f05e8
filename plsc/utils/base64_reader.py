"""Base64 lists as PLSC reads them: one part file for each rank, in the file's order."""

from __future__ import annotations

import base64
import binascii
import os
import random

import numpy as np

from data.base64_reader import label_comes_first, read_file_list, scan_part
from data.images import decode_image
from plsc.environment import trainer
from plsc.utils.jpeg_reader import load_bin, normalized, test
from runtime.errors import DamagedItem, DataError

__all__ = ["load_bin", "test", "train"]


def train(data_dir, num_classes: int):
    """A reader of this rank's part file; the parts must be as many as the ranks (tools/process_base64_files.py)."""
    file_list = os.path.join(data_dir, "file_list.txt")
    parts = read_file_list(file_list)
    rank, ranks = trainer()
    if len(parts) != ranks:
        raise DataError(
            f"{file_list}: names {len(parts)} files for {ranks} ranks: "
            f"run tools/process_base64_files.py --nranks={ranks} on it"
        )
    part, label_first = parts[rank], label_comes_first(parts[0])

    def reader():
        with open(part, "rb") as file:
            for line in scan_part(part, label_first):
                file.seek(line.offset)
                place = f"{part} byte {line.offset}"
                if line.label >= num_classes:
                    raise DataError(f"{place}: label {line.label} is outside the {num_classes} classes")
                try:
                    image_HWC = decode_image(base64.b64decode(file.read(line.length), validate=True))
                except binascii.Error:
                    raise DataError(f"{place}: the image is not base64") from None
                except DamagedItem as error:
                    raise DataError(f"{place}: {error}") from None
                image_CHW = normalized(image_HWC)
                yield np.ascontiguousarray(image_CHW[:, :, ::-1]) if random.random() < 0.5 else image_CHW, line.label

    return reader
