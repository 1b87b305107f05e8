"""How rows of numbers are stored: class centers and their momentum, in less than float32 where that is wanted.

A table gives rows in its work dtype (`read`), takes them back rounded (`write`), and lists the tensors that it is made
of (`tensors`), for checkpoints. `where` is a slice or int64 row numbers.

Rounding to fewer bits is stochastic: an SGD step is mostly smaller than half the distance between two bfloat16 or int8
values, and rounding to the nearest would lose every one of them. The noise is a hash of (key, global row, column): the
same whatever the order of the walk, the number of ranks or the implementation.
"""

from __future__ import annotations

import torch

BLOCK = 128  # elements that share one scale in a byte table
VELOCITY_NOISE = 0x5BD1E995  # tells the noise of a row's second table from the first's
# mantissa bits of float32 that the type does not keep
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


class FloatTable:
    """[rows, width] in a floating dtype. `read` of a slice of an unrounded table is the table itself, not a copy."""

    def __init__(self, data: torch.Tensor, work_dtype: torch.dtype):
        self.data, self.work_dtype = data, work_dtype

    def read(self, where) -> torch.Tensor:
        return rows_of(self.data, where).to(self.work_dtype)

    def write(self, where, rows_KW: torch.Tensor, noise: Noise) -> None:
        if self.data.dtype in DROPPED_BITS:
            rows_KW = round_stochastically(rows_KW, self.data.dtype, noise.bits(rows_KW.shape[1]))
        if not (isinstance(where, slice) and self.data[where].data_ptr() == rows_KW.data_ptr()):
            self.data[where] = rows_KW.to(self.data.dtype)

    def tensors(self) -> dict:
        return {"": self.data}


class ByteTable:
    """[rows, width] as int8 with a float32 scale per BLOCK elements of a row: width + 4 * ceil(width / BLOCK) bytes."""

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, work_dtype: torch.dtype):
        self.data, self.scale, self.work_dtype = data, scale, work_dtype

    def read(self, where) -> torch.Tensor:
        data_KW = rows_of(self.data, where)
        scale_KW = _spread(rows_of(self.scale, where), data_KW.shape[1])
        return data_KW.to(self.work_dtype).mul_(scale_KW)

    def write(self, where, rows_KW: torch.Tensor, noise: Noise) -> None:
        width = rows_KW.shape[1]
        blocks_KNB = _blocks(rows_KW)
        scale_KN = blocks_KNB.abs().amax(2) / 127
        inverse_KN = torch.where(scale_KN > 0, scale_KN.reciprocal(), torch.zeros_like(scale_KN))
        exact_KW = rows_KW * _spread(inverse_KN, width)
        # 23 bits of noise make a number below 1 that a float32 holds exactly
        fraction_KW = (noise.bits(width) & (2**23 - 1)).to(rows_KW.dtype) * 2.0**-23
        code_KW = exact_KW.add_(fraction_KW).floor_().clamp_(-127, 127).to(torch.int8)
        self.data[where] = code_KW
        self.scale[where] = scale_KN.to(self.scale.dtype)

    def tensors(self) -> dict:
        return {"": self.data, "_scale": self.scale}


def make_table(rows: int, width: int, dtype: torch.dtype, work_dtype: torch.dtype, device, pin: bool = False):
    """A table of zeros. dtype: torch.int8 makes a ByteTable. pin: in host memory that the device itself can read."""

    def zeros(columns, dtype):
        # written to at once: memory that is promised but not there would be missed in the middle of a run
        return torch.empty(rows, columns, dtype=dtype, device=device, pin_memory=pin).zero_()

    if dtype == torch.int8:
        return ByteTable(zeros(width, dtype), zeros(-(-width // BLOCK), torch.float32), work_dtype)
    return FloatTable(zeros(width, dtype), work_dtype)


def rows_of(data: torch.Tensor, where) -> torch.Tensor:
    """data[where]: a view for a slice; for row numbers a copy, by the quicker of torch's two ways."""
    return data[where] if isinstance(where, slice) else data.index_select(0, where)


def bytes_per_row(width: int, dtype: torch.dtype | None) -> int:
    """What a row takes in a table of that dtype; 0 for None."""
    if dtype is None:
        return 0
    if dtype == torch.int8:
        return width + 4 * -(-width // BLOCK)
    return width * torch.empty(0, dtype=dtype).element_size()


class Noise:
    """Random bits for rows of a table: a function of the key, the row's global number and the column.

    where: the rows, a slice or int64 numbers within this rank, whose first has the global number first_row."""

    def __init__(self, key: int, where, first_row: int, device):
        self.key, self.where, self.first_row, self.device = key, where, first_row, device

    def other(self) -> Noise:
        """Independent noise for a second table with the same rows."""
        return Noise(self.key ^ VELOCITY_NOISE, self.where, self.first_row, self.device)

    def bits(self, width: int) -> torch.Tensor:
        """[K, width] int32."""
        row_K = self.where
        if isinstance(row_K, slice):
            row_K = torch.arange(row_K.start, row_K.stop, device=self.device)
        row_K = mix(mix(row_K + self.first_row) + mix(self.key))
        column_W = mix(torch.arange(width, device=row_K.device) + 0x2545F491)
        bits_KW = row_K.to(torch.int32)[:, None] + column_W.to(torch.int32)[None, :]
        # int32 products wrap around, and >> copies the sign: both are fine for a hash
        bits_KW.bitwise_xor_(bits_KW >> 15).mul_(0x2C1B3C6D)
        bits_KW.bitwise_xor_(bits_KW >> 12).mul_(0x297A2D39)
        return bits_KW.bitwise_xor_(bits_KW >> 15)


def round_stochastically(rows: torch.Tensor, dtype: torch.dtype, bits: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16 or float16, up or down with the probability that makes the mean exact.

    bits: int32, of the same shape. float16's subnormals (below 6e-5) go to the nearest."""
    below = (1 << DROPPED_BITS[dtype]) - 1
    raised = rows.to(torch.float32).view(torch.int32) + (bits & below)
    return (raised & ~below).view(torch.float32).to(dtype)


def mix(x):
    """A 31-bit hash, of Python's integers or of int64 tensors."""
    x = x & (2**32 - 1)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & (2**32 - 1)
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & (2**32 - 1)
    return (x ^ (x >> 16)) & (2**31 - 1)


def _blocks(rows_KW):
    width = rows_KW.shape[1]
    short = -width % BLOCK
    if short:
        rows_KW = torch.nn.functional.pad(rows_KW, (0, short))
    return rows_KW.view(rows_KW.shape[0], -1, BLOCK)


def _spread(scale_KN, width):
    """One value per block -> one per element, [K, width]."""
    return scale_KN[:, :, None].expand(-1, -1, BLOCK).reshape(scale_KN.shape[0], -1)[:, :width]
