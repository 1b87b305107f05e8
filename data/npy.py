"""Untrusted `.npy` content: numpy's own reader allocates what the header claims before it looks how much there is."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.lib import format as npy

from runtime.errors import DataError


def read_npy(data: bytes, place) -> np.ndarray:
    """The array in the bytes of a .npy file. DataError, which begins with `place`, for anything else or objects."""
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        start = file.tell()
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - start:
            raise ValueError(f"its header does not fit its {len(data)} bytes")
        array = np.frombuffer(data, dtype, offset=start) if len(data) > start else np.empty(0, dtype)
        return array.reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # a damaged header fails in a dozen ways
        raise DataError(f"{place}: is no whole .npy file ({str(error)[:100]}): write it again") from None
