"""Files written whole or not at all, and the one checksum of the project: sha256.

Every file that a command leaves goes through `atomic_file` (or atomic_path, write_text, write_json), so that a full
disk, a kill or a power cut leaves the old file or the new one, and two runs that write the same name cannot spoil each
other's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import UserError

# A killed process leaves its temporary file; one that nobody has written to for this long has no owner.
STALE_S = 3600.0
_BLOCK_BYTES = 1 << 20


def open_regular(path):
    """A file opened to read bytes. OSError for what cannot be, and at once for a pipe or a device, on which a reader
    would wait for ever or without end."""
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except ValueError:
        raise OSError(errno.EINVAL, "no name of a file", path) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", path)
    return file


@contextmanager
def atomic_path(path, error: type[UserError] = UserError, suffix: str = "") -> Iterator[Path]:
    """Yields a path that nobody uses, for a writer that opens files by itself; what it wrote there becomes `path` in
    one step when the block ends, or leaves no trace when it fails.

    suffix: how the path has to end. Raises `error`, one line with the cure, where `path` is something other than a
    file, and for any OSError in the block: what was there before is then untouched.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a rename would replace a device such as /dev/null by a file
        raise error(f"{path}: cannot be written (it is there and is no file): choose another name")
    temporary = temporary_path(path)
    temporary = temporary.with_name(temporary.name + suffix)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as failure:
        raise error(
            f"{path}: cannot be written ({failure.strerror or failure}); what was there before is untouched: "
            "free space or choose another folder"
        ) from failure
    finally:
        with suppress(OSError):
            os.unlink(temporary)


@contextmanager
def atomic_file(path, error: type[UserError] = UserError) -> Iterator:
    """Yields a binary file that becomes `path`; as atomic_path. It has the permissions that the user's umask gives."""
    with atomic_path(path, error) as temporary, open(temporary, "xb") as file:
        yield file


def write_text(path, text: str, error: type[UserError] = UserError) -> None:
    """The whole text as UTF-8, or no change; as atomic_file."""
    with atomic_file(path, error) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def write_json(path, value, error: type[UserError] = UserError) -> None:
    """The value as JSON, indented; as atomic_file. ValueError for what JSON cannot hold, such as nan."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", error)


def temporary_path(path) -> Path:
    """A name beside `path`, hidden, ending in .tmp, that no other process and no other call uses."""
    path = Path(path)
    return path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:12]}.tmp")


def left_over(folder, pattern: str = "*") -> list[Path]:
    """Temporary files and folders for names like `pattern` whose owner is gone: unchanged for STALE_S seconds."""
    found = []
    for path in Path(folder).glob(f".{pattern}.tmp"):
        with suppress(FileNotFoundError):  # its owner has finished it meanwhile
            if time.time() - path.stat().st_mtime > STALE_S:
                found.append(path)
    return sorted(found)


def sync(path) -> None:
    """Makes the bytes of a file, or the renames inside a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(data) -> str:
    """sha256 of bytes (or of any contiguous buffer), in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def file_checksum(path) -> str:
    """sha256 of a file's bytes, in hexadecimal; reads block by block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(_BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()
