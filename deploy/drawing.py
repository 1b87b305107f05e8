"""Boxes and names on a photo, with a font that has the names' characters."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image, ImageDraw, ImageFont

log = logging.getLogger(__name__)

# Fonts with Chinese, as systems and the original demo's download name them; the first that is found is taken.
FONT_NAMES = (
    "sourcehansans",
    "notosanscjk",
    "notosanssc",
    "wqy-microhei",
    "wqy-zenhei",
    "droidsansfallback",
    "msyh",
    "simhei",
    "pingfang",
    "arial unicode",
)
FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
    "C:/Windows/Fonts",
)


def colour(number: int) -> tuple[int, int, int]:
    """The colour of the number-th name: 0 black, then dark red, green, olive, blue, ... (the bits of the number)."""
    channels = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            channels[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
    return tuple(channels)


@functools.lru_cache(maxsize=1)
def chinese_font() -> Optional[str]:
    """The path of a font with Chinese characters: beside the project or in the current folder, else the system's."""
    here = [Path.cwd(), Path(__file__).resolve().parents[1]]
    found = [path for folder in here for path in folder.glob("*.[ot]t[fc]")]
    for folder in FONT_FOLDERS:
        for place, _, names in os.walk(os.path.expanduser(folder)):
            found += [Path(place, name) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]
    for wanted in FONT_NAMES:
        for path in found:
            if wanted in path.name.lower() and _has_chinese(str(path)):
                return str(path)
    return None


def _has_chinese(path: str) -> bool:
    try:
        font = ImageFont.truetype(path, 20)
        return bytes(font.getmask("\u4e2d")) != bytes(font.getmask("\uffff"))
    except (OSError, ValueError):
        return False


@functools.lru_cache(maxsize=64)
def load_font(size: int, path: str = "") -> ImageFont.ImageFont:
    """path: of a font file; "" finds one. OSError where the file is no font."""
    return ImageFont.truetype(path or chinese_font(), size) if path or chinese_font() else ImageFont.load_default(size)


def draw_faces(image_HWC: np.ndarray, boxes_N4, texts, colours, font: str = "") -> np.ndarray:
    """A copy of the photo with a box around each face and its text in a bar of the same colour above it.

    The bar stays inside of the picture: where there is no room above the box, it lies at the box's top.
    """
    if any(ord(character) > 0x2E80 for text in texts for character in text) and not (font or chinese_font()):
        _say_no_font()
    image = Image.fromarray(image_HWC)
    draw = ImageDraw.Draw(image)
    for (x1, y1, x2, y2), text, rgb in zip(np.asarray(boxes_N4, int).tolist(), texts, colours):
        writing = load_font(max((x2 - x1) // 6, 10), font)
        draw.rectangle((x1, y1, x2, y2), outline=rgb, width=2)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=writing)
        width, height = right - left + 4, bottom - top + 4
        bar_x, bar_y = max(min(x1, image.width - width), 0), max(y1 - height, 0)
        draw.rectangle((bar_x, bar_y, bar_x + width, bar_y + height), fill=rgb)
        draw.text((bar_x + 2 - left, bar_y + 2 - top), text, "white", writing)
    return np.asarray(image)


@functools.lru_cache(maxsize=1)  # said once
def _say_no_font() -> None:
    log.warning("no font with Chinese characters was found: install one (fonts-noto-cjk) or name it by --font")
