"""`.pth` files: written so that a crash never leaves half of one, read as if a stranger had made them.

A file of ours is a dict of tensors and plain Python values, in the schema `model head optimizer epoch config` plus
`meta` (what the network is) and `training` (what a resumed run needs), so `torch.load(weights_only=True)` reads it.

Reading takes two passes. The first walks the pickle with every name replaced by an inert stand-in: it refuses whatever
is not a tensor or plain data, and sizes that the file does not hold. Nothing of the file has run or been allocated by
then, and the verdict is the same under every torch. The second pass is torch's own loader.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import pickle
import re
import types
import warnings
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from runtime.errors import CheckpointError
from runtime.files import atomic_file, left_over

log = logging.getLogger(__name__)

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
NAME = re.compile(r"model_(?P<time>\d{4}(?:-\d{2}){4})_epoch:(?P<epoch>\d+)_(?P<accuracy>\d+\.\d{5})\.pth")


# --- writing ---------------------------------------------------------------------------------------------------------


def save_pth(path, state: dict) -> None:
    """Writes `state` (tensors and plain values) to `path` atomically: the file is the old one or the whole new one.

    Raises CheckpointError for a value that is neither tensor nor plain, and when the disk refuses; the temporary file
    is gone then and an older file of that name untouched.
    """
    _check_plain(state, "")
    with atomic_file(path, CheckpointError) as file:
        quiet = _QuietFile(file)
        torch.save(_on_host(state), quiet)
        if quiet.error is not None:
            raise quiet.error


class _QuietFile:
    """Keeps the first write error for later instead of raising it.

    torch's zip writer finishes the archive in its destructor; an exception out of `write` there ends the process.
    """

    def __init__(self, raw):
        self._raw = raw
        self.error = None

    def write(self, data) -> int:
        if self.error is None:
            try:
                return self._raw.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._raw.flush()
            except OSError as error:
                self.error = error


def _check_plain(value, place: str) -> None:
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int, float, bool):
                raise CheckpointError(f"{place or 'checkpoint'}: key {key!r} is a {type(key).__name__}: use str or int")
            _check_plain(item, f"{place}.{key}" if place else str(key))
    elif kind in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif kind in (torch.Tensor, torch.nn.Parameter):
        if any(step == 0 and size > 1 for size, step in zip(value.shape, value.stride())):
            raise CheckpointError(f"{place}: an expanded tensor holds fewer numbers than it claims: save .contiguous()")
    elif kind not in (str, int, float, bool, type(None)):
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise CheckpointError(f"{place}: {name} cannot go into a checkpoint: store tensors and plain values")


def _on_host(value):
    """The same with every tensor in host memory: a file that names its device is not read where there is none."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        host = copy.copy(value)  # with the _metadata that a module's state dict carries
        host.update((key, _on_host(item)) for key, item in value.items())
        return host
    if kind in (list, tuple):
        return kind(_on_host(item) for item in value)
    return value.cpu() if isinstance(value, torch.Tensor) else value


# --- reading ---------------------------------------------------------------------------------------------------------


def load_pth(path, map_location="cpu") -> Any:
    """Reads tensors and plain data from `path`, written by any torch since 1.0; runs nothing that it brings along.

    Raises CheckpointError (one line: file, cause, cure) for a missing, cut-off, damaged, foreign or hostile file.
    """
    path = Path(path)
    with _explained(path), open(path, "rb") as file:
        names = inspect_pth(file, path, verify_bytes=True)
        file.seek(0)
        if names & set(LINEAGE_CONFIG):
            log.info("%s: of its config only plain values and paths are read", path)
        if _HAS_WEIGHTS_ONLY and names <= SAFE_SINCE_1_13:
            options = {"weights_only": True}
        else:
            # torch's safe loader is not there, or lacks some names. The one below admits ADMITTED and nothing else.
            options = {"pickle_module": _RESTRICTED, **({"weights_only": False} if _HAS_WEIGHTS_ONLY else {})}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the source code of the classes that stand-ins replace
            return torch.load(file, map_location=map_location, **options)


_HAS_WEIGHTS_ONLY = "weights_only" in inspect.signature(torch.load).parameters


@contextmanager
def _explained(path):
    """Whatever reading raises becomes one CheckpointError line about `path`."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint: check the path") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}): check the path") from error
    except (EOFError, _CutOff) as error:
        raise CheckpointError(
            f"{path}: cut off or damaged ({_one_line(error) or 'ends too early'}): copy it again or take an older one"
        ) from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: does not fit into memory: use a machine with more") from error
    except Exception as error:
        # A hostile file can make an unpickler raise anything at all; none of it is a fault of the caller.
        raise CheckpointError(
            f"{path}: not a checkpoint that can be read safely ({_one_line(error)}): "
            "use one that holds only tensors and plain values"
        ) from error


def _one_line(error) -> str:
    return " ".join(str(error).split())[:200]


class _CutOff(Exception):
    pass


class _Refused(Exception):
    pass


def inspect_pth(file, path, verify_bytes: bool) -> set:
    """The first pass: raises unless `file` is a whole torch file of tensors and plain data whose sizes are real.

    verify_bytes: also compare every record with its checksum (reads the whole file). Returns the (module, name) pairs
    that the file asks for.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(4)
    file.seek(0)
    if head == b"PK\x03\x04":
        return _inspect_zip(file, size, verify_bytes)
    elif head[:2] == b"\x80\x02":
        return _inspect_legacy(file, size)
    elif size == 0:
        raise _CutOff("empty")
    raise CheckpointError(f"{path}: not a checkpoint (starts with {head!r}): pass a .pth file written by torch")


def _inspect_zip(file, size: int, verify_bytes: bool) -> set:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise _CutOff("its directory is missing") from error
    entries = archive.infolist()
    # Below: whatever could make torch's zip reader see other records than this one does.
    if size < 22 or archive.comment or not entries or min(entry.header_offset for entry in entries) != 0:
        raise _Refused("odd zip layout")
    names = [entry.filename.lower() for entry in entries]
    if len(set(names)) != len(names):
        raise _Refused("two records of one name")
    root = entries[0].filename.split("/")[0]
    records = {entry.filename[len(root) + 1 :]: entry.file_size for entry in entries}
    if "constants.pkl" in records:
        raise _Refused("a TorchScript program, not a checkpoint")
    for entry in entries:
        if entry.external_attr & 0x10 or entry.flag_bits & 1:
            # "A folder" or "encrypted": torch 1.8's reader then leaves the record's memory as it happens to be.
            raise _CutOff(f"record {entry.filename!r} has odd attributes")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise _Refused(f"record {entry.filename!r} is compressed, which torch never does")
        if entry.header_offset + entry.file_size > size:
            raise _CutOff(f"record {entry.filename!r} reaches past the end")
    if any(entry.filename.split("/")[0] != root for entry in entries) or "data.pkl" not in records:
        raise _Refused("a zip file, but not torch's")
    try:
        damaged = archive.testzip() if verify_bytes else None
        with archive.open(f"{root}/data.pkl") as data:
            contents = _DryRun(data, records["data.pkl"], records=records)
            contents.load()
    except zipfile.BadZipFile as error:
        raise _CutOff(_one_line(error)) from error
    if damaged is not None:
        raise _CutOff(f"record {damaged!r} differs from its checksum")
    return contents.names


def _inspect_legacy(file, size: int) -> set:
    if _DryRun(file, size).load() != LEGACY_MAGIC:
        raise _Refused("a pickle, but not torch's")
    for _version_then_machine in range(2):
        _DryRun(file, size).load()
    contents = _DryRun(file, size)
    contents.load()
    keys = _DryRun(file, size).load()
    # Each storage is a count of 8 bytes and the numbers themselves; torch compares the counts.
    if set(keys) != set(contents.claimed) or file.tell() + 8 * len(keys) + sum(contents.claimed.values()) > size:
        raise _CutOff("its tensors are larger than the file")
    return contents.names


class _Storage(NamedTuple):
    numel: int


def _stand_in_tensor(storage, offset, shape, stride, *_rest):
    """Refuses a view that reaches outside its storage: `Tensor.set_` would enlarge the storage to fit."""
    numbers = [offset, *shape, *stride]
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise _Refused("a malformed tensor")
    count, last = 1, offset
    for size, step in zip(shape, stride):
        count *= size
        last += (size - 1) * step
    if len(shape) != len(stride) or (count and (last >= storage.numel or count > storage.numel)):
        raise _CutOff("a tensor is larger than its storage")
    return None


def _encode_latin1(text, encoding):
    # How protocol 2 spells bytes. Any other codec would be looked up, that is imported, by a name from the file.
    if encoding != "latin1":
        raise _Refused(f"codec {encoding!r}")
    return text.encode("latin1")


class _Nothing:
    """Stands for a class whose objects a checkpoint does not need: making one gives None."""

    dump_patches = False  # torch asks this of the classes in files that it wrote before 1.6

    def __new__(cls, *_args):
        return None


def _path(*parts):
    return "/".join(parts).replace("//", "/")


# The lineage's training script puts its whole EasyDict into a checkpoint, with paths, transforms and the loss. None of
# these classes is imported: values become plain ones, objects None.
LINEAGE_CONFIG = {
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
for _name, _value in LINEAGE_CONFIG.items():
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
            raise _Refused(f"it asks for {module}.{name}")
        self.names.add((module, name))
        return ADMITTED[module, name][self.SIDE]

    def load_build(self):
        attributes = self.stack.pop()
        built = self.stack[-1]
        if type(built) is OrderedDict and set(attributes) <= {"_metadata"}:
            built.__dict__.update(attributes)  # the version numbers that a state dict carries
        elif built is not None and type(built) is not dict:  # what LINEAGE_CONFIG makes needs no attributes
            raise _Refused("it sets attributes")

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
            raise _CutOff("its values are longer than the file")

    dispatch = {**_Unpickler.dispatch, pickle.REDUCE[0]: load_call, pickle.NEWOBJ[0]: load_call}

    def persistent_load(self, identity):
        if identity[0] == "module" and self.records is None:
            return identity[1]  # an nn.Module's class, which find_class has seen
        kind, storage, key, _location, numel = identity[:5]
        if kind not in ("storage", b"storage") or storage not in ITEM_BYTES or type(numel) is not int or numel < 0:
            raise _Refused("it holds something other than tensors and plain values")
        claimed = numel * ITEM_BYTES[storage]
        held = self.size if self.records is None else self.records.get(f"data/{key}", -1)
        if claimed > held:
            raise _CutOff(f"tensor {str(key)[:40]} claims {claimed} bytes, the file holds {max(held, 0)}")
        if self.claimed.setdefault(key, claimed) != claimed:
            raise _Refused("one tensor with two sizes")
        view = identity[5] if len(identity) > 5 else None
        if view is None:
            return _Storage(numel)
        _key, start, length = view
        if min(start, length) < 0 or start + length > numel:
            raise _CutOff("a view is larger than its tensor")
        return _Storage(length)


class _Bounded:
    """Reads no more than the file holds: Python reserves what `read(n)` asks for before it looks."""

    def __init__(self, file, size: int):
        self._file = file
        self._size = size

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise _CutOff("a value is longer than the file")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(1000)


def _load_restricted(file, **options):
    return _Unpickler(file, **options).load()


# What torch before 1.13 takes in place of the pickle module.
_RESTRICTED = types.SimpleNamespace(Unpickler=_Unpickler, load=_load_restricted, __name__="restricted")


# --- what a checkpoint is of -----------------------------------------------------------------------------------------

ARCHITECTURE = ("net_mode", "net_depth", "embedding_size")


def check_architecture(saved_meta: dict, wanted: dict, path="checkpoint") -> None:
    """Raises CheckpointError unless the net in `saved_meta["architecture"]` and its class count are those in `wanted`.

    saved_meta: the checkpoint's `meta`. wanted: any of net_mode, net_depth, embedding_size, num_classes; what either
    side does not state is not compared.
    """
    saved = {**saved_meta, **(saved_meta.get("architecture") or {})}

    def differ(name):
        return None not in (saved.get(name), wanted.get(name)) and saved[name] != wanted[name]

    if any(differ(name) for name in ARCHITECTURE):
        known = [name for name in ARCHITECTURE if saved.get(name) is not None]
        raise CheckpointError(
            f"{path}: holds {' '.join(f'{name} {saved[name]}' for name in known)}, "
            f"this run wants {' '.join(f'{name} {wanted.get(name)}' for name in known)}: "
            f"pass {' '.join(f'--{name}={saved[name]}' for name in known if differ(name))} or another checkpoint"
        )
    if differ("num_classes"):
        raise CheckpointError(
            f"{path}: has {saved['num_classes']} classes, the data {wanted['num_classes']}: "
            "pass --is_finetune to keep the backbone and start a new head, or the data that it was trained on"
        )


# --- the folder of checkpoints ---------------------------------------------------------------------------------------


class Saved(NamedTuple):
    time: str
    epoch: int
    accuracy: float
    path: Path


def checkpoint_name(time: str, epoch: int, accuracy: float) -> str:
    """`model_2026-11-20-16-05_epoch:3_0.99817.pth`; time as year-month-day-hour-minute, accuracy a fraction."""
    return f"model_{time}_epoch:{epoch}_{accuracy:.5f}.pth"


def list_saved(folder) -> list[Saved]:
    """The checkpoints of `folder` by their names, oldest first; other files do not count."""
    found = []
    for path in Path(folder).glob("model_*.pth"):
        match = NAME.fullmatch(path.name)
        if match:
            found.append(Saved(match["time"], int(match["epoch"]), float(match["accuracy"]), path))
    # The name's time has minutes only; several saves of one minute are told apart by when they were written.
    return sorted(found, key=lambda saved: (saved.time, saved.path.stat().st_mtime_ns, saved.epoch))


def newest(folder) -> Path | None:
    """The newest checkpoint of `folder` that is whole, or None."""
    for saved in reversed(list_saved(folder)):
        try:
            with _explained(saved.path), open(saved.path, "rb") as file:
                inspect_pth(file, saved.path, verify_bytes=True)
        except CheckpointError as error:
            log.warning("skipped %s", error)
        else:
            return saved.path
    return None


def prune(folder, keep: int = 0, names=None) -> list[Path]:
    """Deletes old checkpoints and returns them: the best by accuracy, the newest and `keep` more of the newest stay.

    names: of the files that may go; all if None. Temporary files that a killed process left behind go too.
    """
    saved = [one for one in list_saved(folder) if names is None or one.path.name in names]
    if saved:
        best = max(saved, key=lambda one: one.accuracy)
        deleted = [one.path for one in saved[:-1] if one is not best]
        deleted = deleted[: len(deleted) - keep] if keep else deleted
    else:
        deleted = []
    deleted += left_over(folder, "model_*.pth*")
    for path in deleted:
        path.unlink()
    return deleted
