"""arcface_paddle's `.bin` files of one image each: uint32 key length, key, uint32 value length, pickled JPEG bytes."""

from __future__ import annotations

import os
import pickle  # only to write; reading goes through data.safe_pickle
import struct
from pathlib import Path

from data import safe_pickle
from data.images import read_file
from runtime.errors import DamagedItem, DataError
from runtime.files import atomic_file

_LENGTH = struct.Struct("<I")


def build(key: str, image: bytes) -> bytes:
    """The content of a kv `.bin` that holds an encoded image as it is, under its file's name."""
    name, value = os.fsencode(key), pickle.dumps(image, -1)
    return _LENGTH.pack(len(name)) + name + _LENGTH.pack(len(value)) + value


def parse(data: bytes) -> tuple[str, bytes]:
    """(key, encoded image) from the content of a kv `.bin`; DamagedItem if it is cut off or holds anything else."""
    name, rest = _field(data, "key")
    value, rest = _field(rest, "value")
    if rest:
        raise DamagedItem(f"{len(rest)} bytes follow the value: not a kv .bin of one image")
    try:
        image = safe_pickle.load(value, "value")
    except DataError as error:
        raise DamagedItem(str(error)) from None
    if not isinstance(image, bytes):
        raise DamagedItem(f"its value is {type(image).__name__}, where the bytes of an image are expected")
    return os.fsdecode(name), image


def _field(data: bytes, what: str) -> tuple[bytes, bytes]:
    if len(data) < _LENGTH.size:
        raise DamagedItem(f"cut off before the length of its {what}")
    (length,) = _LENGTH.unpack_from(data)
    if length > len(data) - _LENGTH.size:
        raise DamagedItem(f"claims a {what} of {length} bytes and has {len(data) - _LENGTH.size}")
    return data[_LENGTH.size : _LENGTH.size + length], data[_LENGTH.size + length :]


def image_to_bin(image_path, bin_path) -> None:
    """Pack one image file, its bytes unchanged. Raises DataError if it cannot be read."""
    image_path = Path(image_path)
    try:
        image = read_file(image_path)
    except DamagedItem as error:
        raise DataError(f"{image_path}: {error}") from None
    with atomic_file(bin_path, DataError) as file:
        file.write(build(image_path.name, image))


def bin_to_image(bin_path, image_path) -> None:
    """Unpack one kv `.bin` into the image's own bytes. Raises DataError if it is not one."""
    try:
        image = parse(read_file(bin_path))[1]
    except DamagedItem as error:
        raise DataError(f"{bin_path}: {error}") from None
    with atomic_file(image_path, DataError) as file:
        file.write(image)
