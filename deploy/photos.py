"""Photos as users have them: any orientation, colour mode and size, decoded to uint8 RGB or refused in one line."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.images import read_file
from runtime.errors import DamagedItem, DataError

# A phone's 108 megapixels pass; a bomb of a few kilobytes that claims 30,000 x 30,000 does not.
MAX_PIXELS = 120_000_000
# Pillow also opens formats that start other programs (EPS), and many that were never photos.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".heic", ".heif")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif")


def decode_photo(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An encoded photo as uint8 [H, W, 3] RGB, turned as its EXIF orientation says.

    Of an animation the first picture counts; alpha is laid on white; 16-bit and float greys are scaled to 8 bits.
    Dimensions are checked before anything is decoded. Raises DamagedItem, one line.
    """
    image = _open(data, max_pixels)
    _check_pixels(image.size, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF blocks
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # Pillow's plug-ins raise many kinds of errors on hostile bytes
        raise DamagedItem(f"damaged or cut off {image.format} ({error})") from None


def read_photo(path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """`decode_photo` of a file; DamagedItem names no path, because callers do."""
    return decode_photo(read_file(path), max_pixels)


def _check_pixels(size, max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise DamagedItem(f"claims {size[0]}x{size[1]} pixels; at most {max_pixels} are decoded")


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise DamagedItem("is empty")
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        try:
            import pillow_heif
        except ImportError:
            raise DamagedItem("is a HEIC photo: pip install pillow-heif, or save it as JPEG") from None
        try:
            heif = pillow_heif.open_heif(data, convert_hdr_to_8bit=True)
            _check_pixels(heif.size, max_pixels)
            return heif.to_pillow()  # decodes
        except DamagedItem:
            raise
        except Exception as error:
            raise DamagedItem(f"damaged HEIC ({error})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the pixels are counted by the caller
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # raised at twice Pillow's own limit
        raise DamagedItem(f"claims more pixels than are decoded ({error})") from None
    except Exception as error:
        reason = "no image format that is read here, or cut off" if isinstance(error, OSError) else str(error)
        raise DamagedItem(f"not an image ({reason})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        grey_HW = np.asarray(image, np.float64)
        # 16-bit files hold 0..65535, float ones 0..1 or 0..255
        scale = 1 / 257 if image.mode.startswith("I") else 255 if grey_HW.max(initial=0) <= 1 else 1
        return Image.fromarray(np.nan_to_num(grey_HW * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def list_photos(folder) -> Iterator[Path]:
    """Every file with a photo's ending below `folder`, sorted, as paths relative to it.

    Links to folders are not followed: one to itself would never end.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if Path(name).suffix.lower() in SUFFIXES:
                yield Path(place, name).relative_to(folder)
