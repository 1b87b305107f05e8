"""Encoded images to uint8 arrays: dimensions are checked before anything is decoded or allocated.

Shapes: H height, W width; arrays are uint8 [H, W, 3] in RGB order.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

from runtime.errors import DamagedItem, DataError
from runtime.files import atomic_file, open_regular

try:
    import simplejpeg
except ImportError:  # Pillow decodes the same pixels at less than half the speed
    simplejpeg = None

MAX_PIXELS = 4096 * 4096  # a JPEG of a few hundred bytes may claim 65535 x 65535
MAX_FILE_BYTES = 256 << 20  # of one image; MAX_PIXELS of 16-bit colours and transparency take half of it
CHANNEL_ORDERS = ("rgb", "bgr")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_MAX_TEXT_BYTES = 256 << 20  # of a list that is read whole
# Pillow also opens formats that start other programs (EPS) or were never images of faces.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")


def check_channel_order(channel_order: str) -> str:
    """`channel_order` itself; DataError unless it is "rgb" or "bgr"."""
    if channel_order not in CHANNEL_ORDERS:
        raise DataError(f"channel_order {channel_order!r}: choose from {', '.join(CHANNEL_ORDERS)}")
    return channel_order


def _is_turbo(data) -> bool:
    return simplejpeg is not None and bytes(data[:2]) == b"\xff\xd8"


def _open_with_pillow(data) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the pixels are counted below
            return Image.open(io.BytesIO(data), formats=_FORMATS)
    # Pillow's plug-ins raise many kinds of errors on hostile bytes; all of them mean the same here
    except Exception as error:
        text = "no image format that is read here" if isinstance(error, OSError) else str(error)
        raise DamagedItem(f"not an image ({text})") from None


def image_size(data) -> tuple[int, int]:
    """(height, width) from the header of an encoded image; DamagedItem if it has none."""
    if _is_turbo(data):
        try:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
        except ValueError as error:
            raise DamagedItem(f"not a JPEG that can be decoded ({error})") from None
    else:
        width, height = _open_with_pillow(data).size
    return height, width


def _check_size(height: int, width: int, expected: Optional[tuple[int, int]]) -> None:
    if expected is not None and (height, width) != expected:
        raise DamagedItem(f"is {width}x{height} where {expected[1]}x{expected[0]} is needed: align and crop it first")
    if height * width > MAX_PIXELS:
        raise DamagedItem(f"claims {width}x{height} pixels; at most {MAX_PIXELS} are decoded")


def decode_image(data, channel_order: str = "rgb", out_HWC: Optional[np.ndarray] = None) -> np.ndarray:
    """An encoded image (bytes-like) as uint8 [H, W, 3] in RGB order.

    `channel_order` is the order the file holds: "bgr" for files which were written by OpenCV code that never
    swapped. With `out_HWC` (contiguous) the image is decoded in place and must have exactly its size.
    Raises DamagedItem for what cannot be decoded, is cut off, or claims more than MAX_PIXELS.
    """
    expected = None if out_HWC is None else out_HWC.shape[:2]
    if _is_turbo(data):
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(height, width, expected)
            if colorspace not in ("CMYK", "YCCK"):  # those only Pillow converts
                image_HWC = simplejpeg.decode_jpeg(data, colorspace=channel_order.upper(), buffer=out_HWC)
                return image_HWC if out_HWC is None else out_HWC
        except DamagedItem:
            raise
        except ValueError as error:
            raise DamagedItem(f"damaged JPEG ({error})") from None
    image = _open_with_pillow(data)
    _check_size(image.height, image.width, expected)
    try:
        image_HWC = np.asarray(_to_eight_bits(image).convert("RGB"))
    except DamagedItem:
        raise
    except Exception as error:  # as above
        raise DamagedItem(f"damaged {image.format} ({error})") from None
    if channel_order == "bgr":
        image_HWC = image_HWC[:, :, ::-1]
    if out_HWC is None:
        return np.array(image_HWC, order="C")  # a copy: Pillow's own memory is read-only
    out_HWC[...] = image_HWC
    return out_HWC


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey in 8 bits; Pillow would cut every value above 255 to white.

    Raises DamagedItem for other numbers: no file says which of them are black and white.
    """
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):  # as Pillow opens them
        values_HW = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values_HW + 128) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DamagedItem(f"holds {'float' if image.mode == 'F' else '32-bit'} numbers: convert it to 8 bits a channel")
    return image


def read_file(path, most: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of one file; DamagedItem if it is longer than `most`, no regular file, or cannot be read."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise DamagedItem(f"is {size} bytes long; at most {most} are read")
            return file.read()
    except OSError as error:
        raise DamagedItem(f"cannot be read ({error.strerror})") from None


def read_text_file(path) -> str:
    """The text of a list or a record of ours, less a byte-order mark; DataError names the file."""
    try:
        return read_file(path, _MAX_TEXT_BYTES).decode("utf-8-sig")
    except DamagedItem as error:
        raise DataError(f"{path}: {error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no text in UTF-8: save it as that") from None


def inside(root: Path, relative: str, place: str) -> Path:
    """`root / relative`, or DataError: a list may not name files outside its own folder."""
    parts = Path(relative).parts
    if not relative or "\0" in relative or Path(relative).is_absolute() or ".." in parts:
        raise DataError(f"{place}: path {relative!r} leaves the data set's folder: use paths relative to it")
    return Path(root) / relative


def channel_order_path(path) -> Path:
    """Where the channel order of a prepared folder is recorded: one word in a text file beside it."""
    path = Path(os.path.abspath(path))  # "." has no name
    return path.parent / f"{path.name}_channel_order.txt"


def recorded_channel_order(path) -> Optional[str]:
    """What tools.prepare_data recorded beside a folder; None if nothing was."""
    record = channel_order_path(path)
    if not os.path.isfile(record):
        return None
    word = read_text_file(record).strip().lower()
    if word not in CHANNEL_ORDERS:
        raise DataError(f"{record}: {word[:20]!r} is not a channel order: write rgb or bgr into it")
    return word


def contact_sheet(dataset, path, rows: int = 8, cols: int = 12) -> None:
    """Write a PNG that shows a training set: each row the first images of one class, classes spread over the set.

    dataset: anything with `.labels` int64 [N], `[i] -> (uint8 [H, W, 3], class)` and `.size`. Damaged images stay
    black. Raises DataError if the file cannot be written.
    """
    classes = np.unique(dataset.labels)
    chosen = classes[np.linspace(0, len(classes) - 1, min(rows, len(classes))).astype(int)]
    height, width = dataset.size
    cols = min(cols, max(int((dataset.labels == label).sum()) for label in chosen))
    sheet = np.zeros((len(chosen) * height, cols * width, 3), np.uint8)
    for row, label in enumerate(chosen):
        for col, index in enumerate(np.flatnonzero(dataset.labels == label)[:cols]):
            try:
                sheet[row * height : (row + 1) * height, col * width : (col + 1) * width] = dataset[int(index)][0]
            except DamagedItem:
                continue
    with atomic_file(path, DataError) as file:
        Image.fromarray(sheet).save(file, "PNG")
