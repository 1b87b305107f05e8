"""How rows of numbers are stored: class centers and their momentum, in less than float32 where that is wanted.

A table gives rows in its work dtype (`read`), takes them back rounded (`write`), and lists the tensors that it is made
of (`tensors`), for checkpoints. `where` is a slice or int64 row numbers; keep, a 0-dim bool, is False where a write
must change nothing, which the host does not know.

Rounding to fewer bits is stochastic: an SGD step is mostly smaller than half the distance between two bfloat16 or int8
values, and rounding to the nearest would lose every one of them. The noise comes from a generator of the table's
device, which the update seeds (`head.centers`): the same after a resume, and no arithmetic that some devices lack.
"""

from __future__ import annotations

import torch

from head.ops import rows_of

BLOCK = 128  # elements that share one scale in a byte table
DROPPED_BITS = {torch.bfloat16: 16}  # mantissa bits of float32 that the type does not keep


class FloatTable:
    """[rows, width] in a floating dtype. `read` of a slice of an unrounded table is the table itself, not a copy."""

    def __init__(self, data: torch.Tensor, work_dtype: torch.dtype):
        self.data, self.work_dtype = data, work_dtype

    def read(self, where) -> torch.Tensor:
        return rows_of(self.data, where).to(self.work_dtype)

    def write(self, where, rows_KW: torch.Tensor, generator, keep=None) -> None:
        if self.data.dtype in DROPPED_BITS:
            rows_KW = round_stochastically(rows_KW, self.data.dtype, noise_like(rows_KW, generator))
        if not (isinstance(where, slice) and self.data[where].data_ptr() == rows_KW.data_ptr()):
            _put(self.data, where, rows_KW.to(self.data.dtype), keep)

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

    def write(self, where, rows_KW: torch.Tensor, generator, keep=None) -> None:
        width = rows_KW.shape[1]
        scale_KN = _blocks(rows_KW).abs().amax(2) / 127
        inverse_KN = torch.where(scale_KN > 0, scale_KN.reciprocal(), torch.zeros_like(scale_KN))
        exact_KW = rows_KW * _spread(inverse_KN, width)
        # 23 bits of noise make a number below 1 that a float32 holds exactly
        fraction_KW = (noise_like(rows_KW, generator) & (2**23 - 1)).to(rows_KW.dtype) * 2.0**-23
        _put(self.data, where, exact_KW.add_(fraction_KW).floor_().clamp_(-127, 127).to(torch.int8), keep)
        _put(self.scale, where, scale_KN.to(self.scale.dtype), keep)

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


def table_of(tensors: dict, work_dtype: torch.dtype):
    """The table that is made of these tensors."""
    if "_scale" in tensors:
        return ByteTable(tensors[""], tensors["_scale"], work_dtype)
    return FloatTable(tensors[""], work_dtype)


def bytes_per_row(width: int, dtype: torch.dtype | None) -> int:
    """What a row takes in a table of that dtype; 0 for None."""
    if dtype is None:
        return 0
    if dtype == torch.int8:
        return width + 4 * -(-width // BLOCK)
    return width * torch.empty(0, dtype=dtype).element_size()


def noise_like(rows: torch.Tensor, generator) -> torch.Tensor:
    """31 random bits an element, int32."""
    return torch.empty(rows.shape, dtype=torch.int32, device=rows.device).random_(generator=generator)


def round_stochastically(rows: torch.Tensor, dtype: torch.dtype, bits: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16, up or down with the probability that makes the mean exact; nan stays nan.

    bits: int32, of the same shape."""
    below = (1 << DROPPED_BITS[dtype]) - 1
    rows = rows.to(torch.float32)
    raised = (rows.view(torch.int32) + (bits & below)) & ~below
    # a nan of all ones would run over into -0
    return torch.where(rows == rows, raised.view(torch.float32), rows).to(dtype)


def _put(data, where, rows, keep):
    data[where] = rows if keep is None else torch.where(keep, rows, data[where])


def _blocks(rows_KW):
    width = rows_KW.shape[1]
    short = -width % BLOCK
    if short:
        rows_KW = torch.nn.functional.pad(rows_KW, (0, short))
    return rows_KW.view(rows_KW.shape[0], -1, BLOCK)


def _spread(scale_KN, width):
    """One value per block -> one per element, [K, width]."""
    return scale_KN[:, :, None].expand(-1, -1, BLOCK).reshape(scale_KN.shape[0], -1)[:, :width]
