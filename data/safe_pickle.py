"""Untrusted pickles, read without running anything they name.

Verification `.bin` files and kv `.bin` files are pickles. Only lists, tuples, bytes, text, booleans, numbers and
numpy's array reconstruction are admitted, and the latter is not numpy's own: it is replaced by functions that check
sizes before they build an array.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from typing import Any, Callable

import numpy as np

from runtime.errors import DataError

_MAX_DIMENSIONS = 8
_DTYPES = {"u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "f4", "f8", "b1"}
# Protocols 2 to 5, less what can name or build something else. Protocol 0's text forms are out as well.
_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING "
    "SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST "
    "EMPTY_DICT SETITEM SETITEMS APPEND APPENDS TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 BINGET LONG_BINGET BINPUT "
    "LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD"
).split()


class _Refused(Exception):
    """What a pickle holds that is not read; the message names it."""


class _Dtype:
    """Stands for numpy.dtype(code, align, copy)."""

    def __init__(self, code: Any, *_: Any):
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if code not in _DTYPES:
            raise _Refused(f"an array of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in (">", b">"):
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """Stands for numpy.ndarray; `.array` once its state is known."""

    array: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, data = state
        self.array = _build(data, dtype, shape, "F" if by_columns else "C").array


def _build(data: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
    if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)) or not isinstance(shape, tuple):
        raise _Refused("an array without numbers in it")
    # few and small dimensions: the product of a thousand large ones takes minutes
    if len(shape) > _MAX_DIMENSIONS or not all(type(length) is int and 0 <= length <= len(data) for length in shape):
        raise _Refused(f"an array of shape {str(shape)[:60]} made of {len(data)} bytes")
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise _Refused(f"an array of shape {shape} made of {len(data)} bytes")
    holder = _Array()
    holder.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order in ("F", b"F") else "C")
    return holder


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Refused("text encoded other than as latin1")
    return text.encode("latin1")


class _Admitted:
    """A callable that a pickle may name and call, and, having no state, cannot change."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("an attempt to change a function")


_ADMITTED = {
    ("numpy", "dtype"): _Admitted(_Dtype),
    ("numpy", "ndarray"): None,  # named beside _reconstruct, never called
}
for _module in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2
    _ADMITTED[_module + ".multiarray", "_reconstruct"] = _Admitted(lambda kind, shape, code: _Array())
    _ADMITTED[_module + ".multiarray", "scalar"] = _Admitted(lambda dtype, data: _build(data, dtype, ()))
    _ADMITTED[_module + ".numeric", "_frombuffer"] = _Admitted(_build)


class _File(io.BytesIO):
    """Refuses to read more than there is: the lengths in a pickle are claims."""

    def read(self, count: int = -1) -> bytes:
        data = super().read(count)
        if len(data) < count:
            raise EOFError("cut off")
        return data


class _Instructions(dict):
    def __missing__(self, code: int):
        name = next((op.name for op in pickletools.opcodes if ord(op.code) == code), f"0x{code:02x}")
        raise _Refused(f"the instruction {name}")


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler with the instructions in _OPCODES alone.

    The pure Python class on purpose: the C one sizes its memo by a number in the file, allocates what a length claims,
    and in damaged frames reads other instructions than a first look (pickletools) would see.
    """

    dispatch = _Instructions(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES}
    )

    def __init__(self, data: bytes):
        super().__init__(_File(data), encoding="bytes")
        self._encoded, self._most = 0, len(data)

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def _encode(self, text: Any, *encoding: Any) -> bytes:
        """_codecs.encode; a text that a pickle names again and again would become new bytes each time."""
        data = _encode(text, *encoding)
        self._encoded += len(data)
        if self._encoded > self._most:
            raise _Refused("one text encoded many times")
        return data

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _Admitted(self._encode)
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


def load(data: bytes, place: str) -> Any:
    """The value pickled in `data`. Arrays and numpy scalars come back in holders which `as_array` opens.

    place: the file, for messages. Raises DataError for anything that is not plain data, or cut off.
    """
    try:
        return _Unpickler(data).load()
    except _Refused as error:
        raise DataError(
            f"{place}: refused: the pickle holds {error}, and only lists, bytes, numbers and numpy arrays "
            "are read from untrusted pickles"
        ) from None
    except Exception as error:  # a broken pickle fails in a dozen ways
        raise DataError(
            f"{place}: not a whole pickle ({type(error).__name__}: {str(error)[:80]}): copy the file again"
        ) from None


def as_array(value: Any) -> Any:
    """The array (or 0-dimensional array) in a holder; any other value as it is."""
    return getattr(value, "array", None) if isinstance(value, _Array) else value
