"""What is done to a valid input: to bytes, numbers in text, JSON, pickles, zip archives, files and arguments.

Every choice comes from the given `random.Random`, so that a case is the same everywhere.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Optional

HEADER_BYTES = 160  # of a file's beginning, every bit of which is flipped
TAIL_BYTES = 64
NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 16, 27, 111, 112, 113, 127, 128, 255, 256, 4095, 32767, 32768, 65535, 65536, 1 << 20,
    1 << 24,
    (1 << 29) - 1, 1 << 29, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 53) + 1, (1 << 62), (1 << 63) - 9,
    (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, -2, -128, -(1 << 31), -(1 << 63),
)  # fmt: skip
WORDS = (
    "", "0", "1", "-1", "-0", "00", "08", "1.5", "1e3", "1e400", "-1e400", "nan", "inf", "-inf", "NaN", "Infinity",
    "2_0",
    "0x10", "true", "false", "True", "None", "null", "[]", "{}", "²", "٣", "１２", "9" * 19, "9" * 25, "9" * 400,
    "9" * 5000, "-" + "9" * 30,
    "9223372036854775807", "9223372036854775808", "18446744073709551616", "4294967296", "2147483648", "16777217",
    "../outside/secret.jpg", "../secret.jpg", "/etc/passwd", "/dev/full", ".", "..", "/", "~", "a" * 256,
    "a/" * 2100 + "b", "x\0y",
    "\x1b[2J\x1b]0;title\x07", "line\nbreak", "\r", "\t", " ", "\ufeff", "\u202eabc", "<script>alert(1)</script>",
    "%s%n", "'\"", "#",
    "\udcff", "é", "脸", "--", "-", "=", "1,2", "1 2", "1GiB", "1e400GiB", "loop", "fifo",
)  # fmt: skip


class Link(str):
    """In a sample's files: a symbolic link to this."""


class Sparse(int):
    """A file of so many zeros that takes no space."""


class Special(str):
    """ "folder", "fifo", or "closed": a file without any right to it."""


@dataclass(frozen=True)
class Sample:
    """What a target reads: files by their path in its folder, and for commands the arguments.

    Arguments come to the target as the file `ARGUMENTS`, separated by zero bytes.
    """

    files: dict = field(default_factory=dict)
    arguments: Optional[tuple] = None  # None for what is no command

    @classmethod
    def of(cls, files: dict) -> Sample:
        return cls(dict(files))

    def write(self, folder: Path) -> None:
        for name, content in self.files.items():
            path = os.path.join(os.fspath(folder), name)
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                if isinstance(content, Link):
                    os.symlink(content, path)
                elif isinstance(content, Special):
                    if content == "folder":
                        os.mkdir(path)
                    elif content == "fifo":
                        os.mkfifo(path)
                    else:
                        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0))
                elif isinstance(content, Sparse):
                    with open(path, "wb") as file:
                        file.truncate(content)
                else:
                    with open(path, "wb") as file:
                        file.write(content)
            except (OSError, ValueError):
                pass  # a name that no file can have
        if self.arguments is not None:
            text = "\0".join(self.arguments).encode("utf-8", "surrogateescape")
            (folder / ARGUMENTS).write_bytes(text)

    def to_json(self) -> str:
        files = {}
        for name, content in self.files.items():
            if isinstance(content, (Link, Sparse, Special)):
                files[name] = [type(content).__name__, content]
            else:
                files[name] = ["bytes", base64.b85encode(zlib.compress(content, 9)).decode()]
        return json.dumps({"arguments": self.arguments, "files": files}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Sample:
        kinds = {"Link": Link, "Sparse": Sparse, "Special": Special}
        kinds["bytes"] = lambda content: zlib.decompress(base64.b85decode(content))
        value = json.loads(text)
        files = {name: kinds[kind](content) for name, (kind, content) in value["files"].items()}
        return cls(files, None if value["arguments"] is None else tuple(value["arguments"]))


ARGUMENTS = "arguments\x7f"


def arguments_of(folder: Path) -> list:
    """The arguments that a case gives to a command."""
    path = folder / ARGUMENTS
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    path.unlink()
    return text.split("\0") if text else []


def header_bits(sample: Sample) -> list:
    """(file, bit) for every bit of the beginning and the end of each file."""
    bits = []
    for name, content in sorted(sample.files.items()):
        if type(content) is bytes:
            size = len(content)
            places = {*range(min(size, HEADER_BYTES)), *range(max(0, size - TAIL_BYTES), size)}
            bits += [(name, 8 * place + bit) for place in sorted(places) for bit in range(8)]
    return bits


def with_flipped_bit(sample: Sample, place: tuple) -> Sample:
    name, bit = place
    content = bytearray(sample.files[name])
    content[bit // 8] ^= 1 << bit % 8
    return replace(sample, files={**sample.files, name: bytes(content)})


def mutated(sample: Sample, rng: Random, samples: list) -> Sample:
    """One to three changes, mostly to the bytes of one file."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        names = sorted(name for name, content in sample.files.items() if type(content) is bytes)
        if sample.arguments is not None and (not names or rng.random() < 0.8):
            sample = replace(sample, arguments=tuple(_arguments(list(sample.arguments), rng, samples)))
        elif not names or rng.random() < 0.08:
            sample = replace(sample, files=_tree(dict(sample.files), rng))
        else:
            name = rng.choice(names)
            content = change(sample.files[name], rng)
            sample = replace(sample, files={**sample.files, name: content})
    return sample


def change(content: bytes, rng: Random) -> bytes:
    """One change to a file's content, by what it is more often than blindly."""
    ways = [_bytes]
    if content[:1] == b"\x80" and content.endswith(b"."):
        ways += [_pickle] * 3
    elif content[:4] == b"PK\x03\x04":
        ways += [_zip] * 3
    elif content[:6] == b"\x93NUMPY":
        ways += [_text] * 2
    elif b"\0" not in content[:512] and len(content) < 1 << 20:
        ways += [_text] * 3
        if content.lstrip()[:1] in (b"{", b"["):
            ways += [_json] * 4
    return rng.choice(ways)(content, rng)


# --- bytes -----------------------------------------------------------------------------------------------------------


def _bytes(content: bytes, rng: Random) -> bytes:
    data, size = bytearray(content), len(content)
    if not size:
        return bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 8, 100))))
    # headers and ends are where the lengths stand
    at = rng.choice((rng.randrange(size), rng.randrange(min(size, 256)), rng.randrange(max(0, size - 128), size)))
    way = rng.randrange(9)
    if way == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif way <= 3:
        at -= at % rng.choice((1, 4))
        width, order = rng.choice((1, 2, 4, 4, 4, 8)), rng.choice("<<<>")
        number = rng.choice((rng.choice(NUMBERS), size, size - at, rng.randrange(1 << 32)))
        field_ = int.from_bytes(data[at : at + width], "little" if order == "<" else "big")
        if rng.random() < 0.3:
            number = field_ + rng.choice((-1, 1, 4, -4, 256))
        number &= (1 << 8 * width) - 1
        data[at : at + width] = number.to_bytes(width, "little" if order == "<" else "big")
    elif way == 4:
        del data[at:]
    elif way == 5:
        del data[at : at + rng.choice((1, 2, 4, 16, 256))]
    elif way == 6:
        stop = at + rng.choice((1, 2, 4, 16, 256))
        data[at:at] = data[at:stop] * rng.choice((1, 1, 2, 100))
    elif way == 7:
        data[at:at] = rng.choice((b"\0", b"\xff" * 4, b"\n", bytes(64), struct.pack("<f", float("nan")), b"\xed\xd7"))
    else:
        other = rng.randrange(size)
        length = rng.choice((4, 8, 64, 1024))
        data[at : at + length] = content[other : other + length]
    return bytes(data)


# --- text ------------------------------------------------------------------------------------------------------------


def word(rng: Random) -> str:
    return rng.choice(WORDS) if rng.random() < 0.8 else str(rng.choice(NUMBERS))


def _text(content: bytes, rng: Random) -> bytes:
    text = content.decode("utf-8", "surrogateescape")
    way = rng.randrange(8)
    if way <= 3:
        tokens = list(re.finditer(r"[-+.\w]+" if way else r"\S+", text[: 1 << 16]))
        if tokens:
            token = rng.choice(tokens)
            text = text[: token.start()] + word(rng) + text[token.end() :]
    elif way <= 6:
        lines = text.splitlines(keepends=True) or [""]
        at = rng.randrange(len(lines))
        one = lines[at]
        new = rng.choice((
            [], [one, one], [one] * 50, ["\n", one], ["# " + one], ["\ufeff" + one], [one.rstrip("\n") + "\r\n"],
            [one.rstrip("\n")],
            [one.replace("\t", " ")], [one.replace(" ", "\t")], [one * 2], [word(rng) + one], [word(rng) + "\n"],
            [one.rstrip("\n") + word(rng) + "\n"], [one.upper()], ["\0" + one],
        ))  # fmt: skip
        lines[at : at + 1] = new
        if rng.random() < 0.1:
            rng.shuffle(lines)
        text = "".join(lines)
    else:
        text = rng.choice(
            ("\ufeff" + text, text.replace("\n", "\r"), text * 2, "", text + "\x1a", text.replace("\n", "\n\n"))
        )
    return text.encode(
        "utf-8", rng.choice(("surrogateescape", "surrogatepass")) if "\udcff" not in text else "surrogateescape"
    )


# --- JSON ------------------------------------------------------------------------------------------------------------


def _nested(depth: int):
    return "[" * depth + "]" * depth


def _json(content: bytes, rng: Random) -> bytes:
    text = content.decode("utf-8", "surrogateescape")
    lines = text.splitlines()
    try:
        if len(lines) > 1 and all(line.startswith("{") for line in lines if line):
            at = rng.randrange(len(lines))  # JSON lines
            lines[at] = _one_json(lines[at], rng)
            text = "\n".join(lines) + "\n"
        else:
            text = _one_json(text, rng)
    except (ValueError, RecursionError):
        return _text(content, rng)
    return text.encode("utf-8", "surrogateescape")


def _one_json(text: str, rng: Random) -> str:
    value = json.loads(text)
    places: list = []

    def visit(node):
        if isinstance(node, dict):
            for key in list(node):
                places.append((node, key))
                visit(node[key])
        elif isinstance(node, list):
            for key in range(min(len(node), 50)):
                places.append((node, key))
                visit(node[key])

    visit(value)
    if not places:
        return rng.choice(("[]", "{}", "null", "1", _nested(100_000), '"x"'))
    node, key = rng.choice(places)
    way = rng.randrange(10)
    marker = None
    if way <= 4:
        node[key] = rng.choice((
            None, True, False, [], {}, "", word(rng), rng.choice(NUMBERS), -1, 0, 1.5, float("nan"), float("inf"),
            10**400,
            [[]], {"": None}, [None], [node[key]], {"x": node[key]}, str(node[key])[:200], "x" * 100_000,
        ))  # fmt: skip
    elif way == 5:
        del node[key]
    elif way == 6 and isinstance(node, list):
        node.insert(key, node[key])
    elif way == 6:
        node[word(rng)] = node[key]
    elif way == 7:
        node[key] = [node[key]] * rng.choice((2, 100, 3000))
    elif way == 8:
        other, other_key = rng.choice(places)
        node[key], other[other_key] = json.loads(json.dumps(other[other_key])), json.loads(json.dumps(node[key]))
    else:
        marker = "MARKER of depth"
        node[key] = marker
    text = json.dumps(value, indent=rng.choice((None, None, 1)) if "\n" in text else None)
    return text.replace(json.dumps(marker), _nested(100_000)) if marker else text


# --- pickle ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(64)
def _opcodes_of(content: bytes) -> tuple:
    """[(opcode, argument, its bytes)] up to STOP."""
    ops = list(pickletools.genops(content))
    ends = [op[2] for op in ops[1:]] + [ops[-1][2] + 1]
    return tuple((op, argument, content[begin:end]) for (op, argument, begin), end in zip(ops, ends))


def _integer(number: int) -> bytes:
    if 0 <= number < 256:
        return b"K" + bytes([number])
    if -(1 << 31) <= number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    data = pickle.encode_long(number)
    return b"\x8a" + bytes([len(data)]) + data


_VALUES = (
    b"N",
    b"\x88",
    b"\x89",
    b"]",
    b")",
    b"C\x00",
    b"C\x03abc",
    b"X\x01\0\0\0x",
    b"X\0\0\0\0",
    b"G" + struct.pack(">d", float("nan")),
    b"}",
    b"U\x02u1",
)
_GLOBALS = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
    b"cnumpy.core.multiarray\n_reconstruct\n",
)  # fmt: skip


def _pickle(content: bytes, rng: Random) -> bytes:
    try:
        ops = list(_opcodes_of(content))
    except Exception:
        return _bytes(content, rng)
    at = rng.randrange(len(ops))
    numbers = [i for i, (op, _a, _b) in enumerate(ops) if op.name in ("BININT", "BININT1", "BININT2", "LONG1")]
    way = rng.randrange(12)
    if way <= 3 and numbers:
        at = rng.choice(numbers)
        ops[at] = (*ops[at][:2], _integer(rng.choice((*NUMBERS, ops[at][1] + 1, ops[at][1] - 1, 1 << 200))))
    elif way == 4:
        tuples = [
            i for i, (op, _a, _b) in enumerate(ops) if op.name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPENDS")
        ]
        at = rng.choice(tuples or [at])
        # more of the same before a container closes: dimensions, images, entries
        before = ops[max(0, at - 1)][2]
        ops[at] = (*ops[at][:2], before * rng.choice((1, 3, 40, 5000)) + ops[at][2])
    elif way == 5:
        memos = [a for op, a, _b in ops if op.name in ("BINPUT", "LONG_BINPUT")] or [0]
        get = b"j" + struct.pack("<I", rng.choice(memos))
        ops[at] = (*ops[at][:2], ops[at][2] + get * rng.choice((1, 2, 500)))
    elif way == 6:
        del ops[at]
    elif way == 7:
        ops.insert(at, ops[at])
    elif way == 8:
        other = rng.randrange(len(ops))
        ops[at], ops[other] = ops[other], ops[at]
    elif way == 9:
        ops[at] = (*ops[at][:2], rng.choice(_VALUES))
    elif way == 10:
        ops.insert(
            at,
            (
                None,
                None,
                rng.choice((*_VALUES, *_GLOBALS, b"2", b"R", b"a", b"0", b"(", b"e", b"b", b"s", b"Q", b"\x81")),
            ),
        )
    else:
        named = [i for i, (op, _a, _b) in enumerate(ops) if op.name == "GLOBAL"]
        at = rng.choice(named or [at])
        ops[at] = (*ops[at][:2], rng.choice(_GLOBALS))
    return b"".join(text for _op, _argument, text in ops)


# --- zip -------------------------------------------------------------------------------------------------------------


def _zip(content: bytes, rng: Random) -> bytes:
    """The archive written again, its checksums right, with one entry changed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            if not infos or sum(info.file_size for info in infos) > 8 * len(content) + 4096:  # empty, or a bomb
                return _bytes(content, rng)
            entries = [(info.filename, archive.read(info)) for info in infos]
    except Exception:
        return _bytes(content, rng)
    # the pickle of a .pth says what its other entries are
    chosen = [i for i, (name, _data) in enumerate(entries) if name.endswith(".pkl")] if rng.random() < 0.7 else []
    at = rng.choice(chosen or range(len(entries)))
    name, data = entries[at]
    way = rng.randrange(8)
    if way <= 4:
        entries[at] = (name, change(data, rng))
    elif way == 5:
        entries[at] = (rng.choice((word(rng) or "x", "../" + name, "/" + name, name + "x", name.upper())), data)
    elif way == 6:
        if rng.random() < 0.5:
            del entries[at]
        else:
            entries.append(entries[at])
    else:
        entries[at] = (name, _Bomb())
    return zip_of(entries)


class _Bomb:
    """A record of 64 MiB of zeros."""


@functools.cache
def _deflated_bomb() -> tuple[bytes, int]:
    deflate, data = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(1 << 20)
    block = deflate.compress(data) + deflate.flush(zlib.Z_FULL_FLUSH)  # after which it may stand again
    check = 0
    for _ in range(64):
        check = zlib.crc32(data, check)
    return 64 * block + b"\3\0", check


def zip_of(entries: list) -> bytes:
    """The bytes of an archive of (name, data), stored as they are; of any names, which zipfile would not write."""
    body, directory = b"", b""
    for name, data in entries:
        name = name.encode("utf-8", "surrogateescape")[:65535]
        method, size = 0, len(data) if isinstance(data, bytes) else 64 << 20
        data, check = (data, zlib.crc32(data)) if isinstance(data, bytes) else _deflated_bomb()
        method = 0 if size == len(data) else 8
        shared = struct.pack("<5H3I2H", 20, 0x800, method, 0, 33, check, len(data), size, len(name), 0)
        directory += b"PK\1\2" + struct.pack("<H", 20) + shared + struct.pack("<3H2I", 0, 0, 0, 0, len(body)) + name
        body += b"PK\3\4" + shared + name + data
    end = struct.pack("<4H2IH", 0, 0, len(entries), len(entries), len(directory), len(body), 0)
    return body + directory + b"PK\5\6" + end


# --- files and arguments ---------------------------------------------------------------------------------------------


def _tree(files: dict, rng: Random) -> dict:
    if not files:
        return {"file": b""}
    name = rng.choice(sorted(files))
    folder, _slash, last = name.rpartition("/")
    way = rng.randrange(12)
    content = files.pop(name)
    if way == 0:
        files[name] = Special("folder")
    elif way == 1:
        files[name] = Link(rng.choice((last, "../outside/secret.jpg", "nothing", ".", "..", "/", "/dev/zero")))
    elif way == 2:
        files[name] = Special("fifo")
    elif way == 3:
        files[name] = Special("closed")
    elif way == 4:
        files[name] = Sparse(rng.choice((6 << 30, 1 << 20)))
    elif way == 5:
        files[name] = b""
    elif way == 6:
        files[name] = content
        files[f"{folder}/loop" if folder else "loop"] = Link(".")
    elif way == 7:
        files[name] = content
        odd = rng.choice(("\x1b[2J", "line\nbreak.jpg", "a" * 255, "\u202e.jpg", "x.tmp", "\udcff.jpg"))
        files[f"{folder}/{odd}" if folder else odd] = content
    elif way == 8 and files:
        other = rng.choice(sorted(files))
        files[name], files[other] = files[other], content
    elif way == 9 and folder:
        files = {key: value for key, value in files.items() if not key.startswith(folder + "/")}
        files[folder] = rng.choice((b"a file where a folder was", Link("."), Special("fifo")))
    elif way == 10:
        files[name + rng.choice(("x", "~", ".bak"))] = content
    return files


def _arguments(arguments: list, rng: Random, samples: list) -> list:
    if not arguments:
        return [word(rng)]
    at = rng.randrange(len(arguments))
    way = rng.randrange(10)
    if way <= 4:
        option, equals, _value = arguments[at].partition("=")
        arguments[at] = f"{option}={word(rng)}" if equals else word(rng)
    elif way == 5:
        del arguments[at]
    elif way == 6:
        arguments.insert(at, arguments[at])
    elif way == 7:
        other = rng.choice(rng.choice(samples).arguments)
        arguments.insert(at, other)
    elif way == 8:
        option = arguments[at]
        arguments[at] = rng.choice(
            (option.replace("_", "-"), option[:-1], option + "x", option.upper(), option.replace("--", "-", 1))
        )
    else:
        arguments.insert(at, word(rng))
    return [argument.replace("\0", "") for argument in arguments]
