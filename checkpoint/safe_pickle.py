"""What a `.pth` file holds, found out without running or allocating anything that it names.

The pickle in it is walked with every name replaced by an inert stand-in: whatever is not a tensor or plain data is
refused, and so are sizes that the file does not hold. The same unpickler with the real objects, of ADMITTED and nothing
else, serves torches whose own safe loader is not there or lacks some names.
"""

from __future__ import annotations

import os
import pickle
import types
import zipfile
from collections import OrderedDict
from inspect import signature
from typing import NamedTuple

import torch

# The first pickle of the format that torch wrote before 1.6 (InsightFace's published weights are of that age).
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
ITEM_BYTES = {
    "FloatStorage": 4,
    "DoubleStorage": 8,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
}
MOST_DIMS = 64  # as many as torch has


class CutOff(Exception):
    """Less is there than the file says."""


class Refused(Exception):
    """What the file holds is not read."""


def inspect(file, verify_bytes: bool = True) -> set:
    """Raises CutOff or Refused unless `file` is a whole torch file of tensors and plain data whose sizes are real.

    verify_bytes: also compare every record with its checksum (reads the whole file). Returns the (module, name) pairs
    that the file asks for. A broken pickle may raise anything else as well.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(4)
    file.seek(0)
    if head == b"PK\x03\x04":
        return _inspect_zip(file, size, verify_bytes)
    elif head[:2] == b"\x80\x02":
        return _inspect_legacy(file, size)
    elif size == 0:
        raise CutOff("empty")
    raise Refused(f"it starts with {head!r}, as no file of torch does")


def _inspect_zip(file, size: int, verify_bytes: bool) -> set:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise CutOff("its directory is missing") from error
    entries = archive.infolist()
    # Below: whatever could make torch's zip reader see other records than this one does.
    if size < 22 or archive.comment or not entries or min(entry.header_offset for entry in entries) != 0:
        raise Refused("odd zip layout")
    names = [entry.filename.lower() for entry in entries]
    if len(set(names)) != len(names):
        raise Refused("two records of one name")
    root = entries[0].filename.split("/")[0]
    records = {entry.filename[len(root) + 1 :]: entry.file_size for entry in entries}
    if "constants.pkl" in records:
        raise Refused("a TorchScript program, not a checkpoint")
    for entry in entries:
        if entry.external_attr & 0x10 or entry.flag_bits & 1:
            # "A folder" or "encrypted": torch 1.8's reader then leaves the record's memory as it happens to be.
            raise CutOff(f"record {entry.filename!r} has odd attributes")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise Refused(f"record {entry.filename!r} is compressed, which torch never does")
        if entry.header_offset + entry.file_size > size:
            raise CutOff(f"record {entry.filename!r} reaches past the end")
    if any(entry.filename.split("/")[0] != root for entry in entries) or "data.pkl" not in records:
        raise Refused("a zip file, but not torch's")
    try:
        damaged = archive.testzip() if verify_bytes else None
        with archive.open(f"{root}/data.pkl") as data:
            contents = _DryRun(data, records["data.pkl"], records=records)
            contents.load()
    except zipfile.BadZipFile as error:
        raise CutOff(str(error)) from error
    if damaged is not None:
        raise CutOff(f"record {damaged!r} differs from its checksum")
    return contents.names


def _inspect_legacy(file, size: int) -> set:
    if _DryRun(file, size).load() != LEGACY_MAGIC:
        raise Refused("a pickle, but not torch's")
    for _version_then_machine in range(2):
        _DryRun(file, size).load()
    contents = _DryRun(file, size)
    contents.load()
    keys = _DryRun(file, size).load()
    # Each storage is a count of 8 bytes and the numbers themselves; torch compares the counts.
    if set(keys) != set(contents.claimed) or file.tell() + 8 * len(keys) + sum(contents.claimed.values()) > size:
        raise CutOff("its tensors are larger than the file")
    return contents.names


class _Storage(NamedTuple):
    numel: int


def _stand_in_tensor(storage, offset, shape, stride, *_rest):
    """Refuses a view that reaches outside its storage: `Tensor.set_` would enlarge the storage to fit."""
    numbers = [offset, *shape, *stride]
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise Refused("a malformed tensor")
    if len(shape) > MOST_DIMS or len(stride) > MOST_DIMS:  # before anything is multiplied
        raise Refused(f"a tensor of {max(len(shape), len(stride))} dimensions")
    count, last = 1, offset
    for size, step in zip(shape, stride):
        count *= size
        last += (size - 1) * step
    if len(shape) != len(stride) or (count and (last >= storage.numel or count > storage.numel)):
        raise CutOff("a tensor is larger than its storage")
    return None


def _encode_latin1(text, encoding):
    # How protocol 2 spells bytes. Any other codec would be looked up, that is imported, by a name from the file.
    if encoding != "latin1":
        raise Refused(f"codec {encoding!r}")
    return text.encode("latin1")


class _Nothing:
    """Stands for a class whose objects a checkpoint does not need: making one gives None."""

    dump_patches = False  # torch asks this of the classes in files that it wrote before 1.6

    def __new__(cls, *_args):
        return None


def _path(*parts):
    return "/".join(parts).replace("//", "/")


# InsightFace_Pytorch's training script puts its whole EasyDict into a checkpoint, with paths, transforms and the loss.
# None of these classes is imported: values become plain ones, objects None.
UPSTREAM_CONFIG = {
    ("easydict", "EasyDict"): dict,
    ("pathlib", "PosixPath"): _path,
    ("pathlib", "WindowsPath"): _path,
    ("__builtin__", "set"): _Nothing,
    ("torch.nn.modules.loss", "CrossEntropyLoss"): _Nothing,
    ("torchvision.transforms.transforms", "Compose"): _Nothing,
    ("torchvision.transforms.transforms", "Normalize"): _Nothing,
    ("torchvision.transforms.transforms", "RandomHorizontalFlip"): _Nothing,
    ("torchvision.transforms.transforms", "ToTensor"): _Nothing,
}
# Everything that a file may name: the real object, and what stands for it in the first pass.
ADMITTED = {
    ("collections", "OrderedDict"): (OrderedDict, OrderedDict),
    ("_codecs", "encode"): (_encode_latin1, _encode_latin1),
    ("torch", "Size"): (torch.Size, tuple),
    ("torch", "device"): (torch.device, _Nothing),
    ("torch._utils", "_rebuild_tensor"): (torch._utils._rebuild_tensor, _stand_in_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): (torch._utils._rebuild_tensor_v2, _stand_in_tensor),
    ("torch._utils", "_rebuild_parameter"): (torch._utils._rebuild_parameter, _Nothing),
}
for _name, _value in list(vars(torch).items()):
    if isinstance(_value, torch.dtype):
        ADMITTED["torch", _name] = (_value, _name)
for _name in ITEM_BYTES:
    # A plain string is not callable, so the stand-in of a storage cannot be asked to allocate one.
    ADMITTED["torch", _name] = (getattr(torch, _name), _name)
for _name, _value in UPSTREAM_CONFIG.items():
    ADMITTED[_name] = (_value, _value)


SAFE_SINCE_1_13 = {
    (module, name)
    for module, name in ADMITTED
    if module in ("collections", "torch._utils") or name == "Size" or name in ITEM_BYTES
}


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler, cut down to what torch.save writes: the names in ADMITTED, binary containers and numbers.

    The pure Python class on purpose: the C one sizes its memo by a number in the file.
    """

    SIDE = 0  # which column of ADMITTED
    OPCODES = (
        "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING "
        "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
        "BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
    ).split()
    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in OPCODES}

    def find_class(self, module: str, name: str):
        if (module, name) not in ADMITTED:
            raise Refused(f"it asks for {module}.{name}")
        self.names.add((module, name))
        return ADMITTED[module, name][self.SIDE]

    def load_build(self):
        attributes = self.stack.pop()
        built = self.stack[-1]
        if type(built) is OrderedDict and set(attributes) <= {"_metadata"}:
            built.__dict__.update(attributes)  # the version numbers that a state dict carries
        elif built is not None and type(built) is not dict:  # what UPSTREAM_CONFIG makes needs no attributes
            raise Refused("it sets attributes")

    def load_newobj(self):
        arguments = self.stack.pop()
        self.stack[-1] = self.stack[-1](*arguments)

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def __init__(self, file, **options):
        super().__init__(file, **options)
        self.names = set()


class _DryRun(_Unpickler):
    """Stand-ins for everything, and sizes held against the records of the zip or (legacy) the size of the file."""

    SIDE = 1

    def __init__(self, file, size: int, records=None):
        super().__init__(_Bounded(file, size), encoding="utf-8")
        self.size = size
        self.records = records
        self.claimed = {}
        self.made = 0

    def load_call(self):
        """Counts what calls make: a value that a pickle names again and again would grow with every call."""
        arguments = self.stack.pop()
        self.stack[-1] = made = self.stack[-1](*arguments)
        self.made += len(made) if hasattr(made, "__len__") else 0
        if self.made > self.size:
            raise CutOff("its values are longer than the file")

    dispatch = {**_Unpickler.dispatch, pickle.REDUCE[0]: load_call, pickle.NEWOBJ[0]: load_call}

    def persistent_load(self, identity):
        if identity[0] == "module" and self.records is None:
            return identity[1]  # an nn.Module's class, which find_class has seen
        kind, storage, key, _location, numel = identity[:5]
        if kind not in ("storage", b"storage") or storage not in ITEM_BYTES or type(numel) is not int or numel < 0:
            raise Refused("it holds something other than tensors and plain values")
        claimed = numel * ITEM_BYTES[storage]
        held = self.size if self.records is None else self.records.get(f"data/{key}", -1)
        if claimed > held:
            raise CutOff(f"tensor {str(key)[:40]} claims {claimed} bytes, the file holds {max(held, 0)}")
        if self.claimed.setdefault(key, claimed) != claimed:
            raise Refused("one tensor with two sizes")
        view = identity[5] if len(identity) > 5 else None
        if view is None:
            return _Storage(numel)
        _key, start, length = view
        if min(start, length) < 0 or start + length > numel:
            raise CutOff("a view is larger than its tensor")
        return _Storage(length)


class _Bounded:
    """Reads no more than the file holds: Python reserves what `read(n)` asks for before it looks."""

    def __init__(self, file, size: int):
        self._file = file
        self._size = size

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise CutOff("a value is longer than the file")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(1000)


def _load_restricted(file, **options):
    return _Unpickler(file, **options).load()


def loader(names: set) -> dict:
    """How torch.load is to read a file that asks for `names` (from `inspect`): options for it."""
    known = "weights_only" in signature(torch.load).parameters
    if known and names <= SAFE_SINCE_1_13:
        return {"weights_only": True}
    # torch before 1.13 takes this in place of the pickle module
    restricted = types.SimpleNamespace(Unpickler=_Unpickler, load=_load_restricted, __name__="restricted")
    return {"pickle_module": restricted, **({"weights_only": False} if known else {})}
