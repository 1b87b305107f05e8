"""The rows of class centers that this rank holds, their momentum, and their SGD.

The update is torch.optim.SGD's (d = gradient + weight_decay * w; v = momentum * v + d; w -= lr * v), a chunk of rows at
a time, from the second pass over the classes (`head.ops`): no gradient of all rows ever exists. State belongs with the
rows: weight, momentum and the row's inverse length move together, as they are stored.
"""

from __future__ import annotations

import logging
import math

import torch

from head.offload import HostTable
from head.ops import Rows, accumulate_dtype, inverse_of, rows_of
from head.storage import FloatTable, make_table, table_of
from runtime.errors import ModelError
from runtime.shard import RowShard

logger = logging.getLogger(__name__)

STEP_ROWS = 8192  # rows of temporaries
INIT_ROWS = 8192  # rows that are made from one seed
INIT_SALT = 0x5EED_C0DE  # so that the rows are not the numbers that others take from the same seed

CENTER_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


class Centers:
    """[rows, width] of `shard`.

    dtype: of the stored weight (bfloat16 is rounded stochastically). momentum_dtype: float32, bfloat16 or
    int8 (see `ByteTable`); momentum 0 stores none. momentum_on_host: it lives in pinned host memory, from where the
    update takes the rows that it moves; host_threads: cores for that.
    init_norm: length of a fresh row in expectation (1: InsightFace_Pytorch; 0.01 * sqrt(width): arcface_torch).
    A row's start depends on the seed and its global number only, so any number of ranks begins with the same table.
    bias: the last column starts at 0 (the head multiplies it by 1). normalise: keep the rows' inverse lengths.
    """

    def __init__(
        self,
        shard: RowShard,
        width: int,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        seed: int = 0,
        init_norm: float = 1.0,
        bias: bool = False,
        normalise: bool = True,
        dtype: torch.dtype = torch.float32,
        momentum_dtype: torch.dtype = torch.float32,
        momentum_on_host: bool = False,
        host_threads: int = 1,
        device=None,
    ):
        if dtype not in CENTER_DTYPES:
            raise ModelError(f"centers in {dtype}: choose from {', '.join(map(str, CENTER_DTYPES))}")
        if momentum_dtype not in MOMENTUM_DTYPES:
            raise ModelError(f"momentum in {momentum_dtype}: choose from {', '.join(map(str, MOMENTUM_DTYPES))}")
        self.shard, self.width, self.bias, self.seed = shard, width, bias, seed
        self.momentum_factor, self.weight_decay = momentum, weight_decay
        # what the learning rate is multiplied with, of the rows and of the bias; a decay of the bias's own
        self.rate, self.bias_rate, self.bias_decay = 1.0, 1.0, None
        self.device = torch.device(device or "cpu")
        self.dtype, self.work_dtype = dtype, accumulate_dtype(dtype)
        if dtype == torch.float64 and momentum_dtype == torch.float32:
            momentum_dtype = torch.float64
        self.table = FloatTable(torch.empty(shard.rows, width, dtype=dtype, device=self.device), self.work_dtype)
        on_host = momentum_on_host and self.device.type != "cpu"
        self.momentum = None
        if momentum:
            place = "cpu" if on_host else self.device
            self.momentum = make_table(shard.rows, width, momentum_dtype, self.work_dtype, place, pin=on_host)
        if momentum and on_host:
            self.momentum = HostTable(self.momentum, self.device, host_threads)
        self.inverse_C = torch.empty(shard.rows, dtype=self.work_dtype, device=self.device) if normalise else None
        self.generator = torch.Generator(device=self.device)  # of the rounding's noise; every update seeds it
        self.updates = 0  # how many there were
        self._fill(init_norm)
        self.measure()

    @property
    def weight(self) -> torch.Tensor:
        """[rows, width] as stored."""
        return self.table.data

    def _fill(self, init_norm):
        # On CUDA the device makes them: at 10^8 rows the host takes minutes.
        source = self.device if self.device.type == "cuda" else torch.device("cpu")
        generator = torch.Generator(device=source)
        dim = self.width - self.bias
        shard = self.shard
        for start in range(shard.start // INIT_ROWS * INIT_ROWS, shard.stop, INIT_ROWS):
            generator.manual_seed((self.seed * 1_000_003 + start // INIT_ROWS + INIT_SALT) % 2**63)
            rows = torch.randn(INIT_ROWS, dim, generator=generator, device=source).mul_(init_norm / math.sqrt(dim))
            a, b = max(start, shard.start), min(start + INIT_ROWS, shard.stop)
            self.weight[a - shard.start : b - shard.start, :dim] = rows[a - start : b - start].to(self.device)
        if self.bias:
            self.weight[:, dim:] = 0

    def measure(self) -> None:
        """The rows' lengths, after the weight was written by others than the update."""
        if self.inverse_C is not None:
            for where in self._pieces():
                self.inverse_C[where] = inverse_of(self.table.read(where).norm(dim=1))

    def _pieces(self):
        for start in range(0, self.shard.rows, STEP_ROWS):
            yield slice(start, min(start + STEP_ROWS, self.shard.rows))

    def rows(self, index_R=None) -> Rows:
        """All of them, or those of index_R (int64, distinct), as an op takes them."""
        return Rows(self.weight, self.inverse_C, index_R)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """This rank's part: the stored tensors themselves, not copies. "momentum_scale" is an int8 momentum's."""
        state = {
            "start": self.shard.start,
            "stop": self.shard.stop,
            "total": self.shard.total,
            "updates": self.updates,
            "weight": self.weight,
            "momentum": None,
            "momentum_scale": None,
        }
        if self.momentum is not None:
            state.update({f"momentum{name}": t for name, t in self.momentum.tensors().items()})
        return state

    def load_state(self, state: dict) -> None:
        """A state of the same rows, bit for bit where it is stored in the same dtypes and rounded where not.

        Raises ModelError where it is of other rows."""
        for name in ("start", "stop", "total"):
            mine, theirs = getattr(self.shard, name), int(state[name])
            if theirs != mine:
                raise ModelError(
                    f"class centers: the checkpoint's {name} is {theirs}, this rank's is {mine}; reshard "
                    "it to this number of ranks and classes first"
                )
        if tuple(state["weight"].shape) != (self.shard.rows, self.width):
            raise ModelError(
                f"class centers: expected {[self.shard.rows, self.width]}, got {list(state['weight'].shape)}"
            )
        self.updates = int(state["updates"])
        if state["weight"].dtype != self.dtype:
            logger.info("class centers: %s in the checkpoint, %s here", state["weight"].dtype, self.dtype)
        self.weight.copy_(state["weight"])
        self.measure()
        if self.momentum is None:
            return
        tensors = self.momentum.tensors()
        theirs = {"": state["momentum"], "_scale": state["momentum_scale"]}
        theirs = {name: tensor for name, tensor in theirs.items() if tensor is not None}
        if theirs and theirs[""].dtype == tensors[""].dtype:
            for name, tensor in theirs.items():
                tensors[name].copy_(tensor)
        else:
            self.load_momentum(table_of(theirs, self.work_dtype) if theirs else None)

    def load_momentum(self, table) -> None:
        """Momentum of all of this rank's rows: another table or a tensor [rows, width]; None is zero."""
        if self.momentum is None:
            return
        mine = self.momentum_table()
        device = mine.tensors()[""].device
        generator = torch.Generator(device=device)
        generator.manual_seed(self.seed)
        for where in self._pieces():
            if table is None:
                rows = torch.zeros(where.stop - where.start, self.width, dtype=self.work_dtype)
            else:
                rows = table[where] if torch.is_tensor(table) else table.read(where)
            mine.write(where, rows.to(device=device, dtype=self.work_dtype), generator)

    def momentum_table(self):
        """The rows' momentum as they are now."""
        if isinstance(self.momentum, HostTable):
            self.momentum.flush()
            return self.momentum.table
        return self.momentum


class Update:
    """One update of some rows, the sink of a second pass (`head.ops.HeadOp`): SGD on each chunk as its gradient comes.

    index_R: the rows on the device, None for all; index_on_host: the same, for momentum that lives there.
    keep: 0-dim bool; where it is False nothing changes. kernel: an op's own SGD, `HeadOp.update_rows`.
    """

    def __init__(self, centers: Centers, lr: float, index_R=None, index_on_host=None, keep=None, kernel=None):
        self.centers, self.lr, self.keep = centers, lr * centers.rate, keep
        self.bias_lr = lr * centers.bias_rate if centers.bias else self.lr
        # a kernel knows one rate and one decay
        self.kernel = kernel if self.bias_lr == self.lr and centers.bias_decay is None else None
        self.rows, self.index_on_host = centers.rows(index_R), index_on_host
        self.seed = (
            centers.seed * 0x9E3779B1 + centers.updates * 0x85EBCA77 + centers.shard.start * 0x27D4EB2F
        ) % 2**31
        centers.generator.manual_seed(self.seed)
        self._ahead = None

    def __call__(self, start, stop, grad_KW, scale_K=None, along_K=None, weight_KW=None) -> None:
        centers, where = self.centers, self.rows.where(start, stop)
        momentum = centers.momentum
        if self.kernel is not None:
            # pinned host memory the kernel reads and writes where it is
            table = momentum.table if isinstance(momentum, HostTable) else momentum
            self.kernel(self, where, grad_KW, scale_K, table)
            return
        if weight_KW is None:
            weight_KW = rows_of(centers.weight, where)
        weight_KW = weight_KW.to(centers.work_dtype)
        if isinstance(momentum, HostTable):
            table = self._fetched(start, stop)
            self._move(where, weight_KW, grad_KW, scale_K, along_K, table, slice(0, stop - start))
            momentum.write_back(self._on_host(start, stop), table)
        else:
            self._move(where, weight_KW, grad_KW, scale_K, along_K, momentum, where)

    def _move(self, where, weight_KW, grad_KW, scale_K, along_K, momentum, place):
        centers, keep = self.centers, self.keep
        if scale_K is not None:
            grad_KW.mul_(scale_K[:, None])
        if along_K is None:
            grad_KW.add_(weight_KW, alpha=centers.weight_decay)
        else:
            grad_KW.addcmul_(weight_KW, (centers.weight_decay - along_K)[:, None])
        if centers.bias_decay is not None:
            grad_KW[:, -1].add_(weight_KW[:, -1], alpha=centers.bias_decay - centers.weight_decay)
        if momentum is not None:
            old_KW = momentum.read(place)  # it may be the table itself
            out_KW = old_KW if keep is None else grad_KW
            grad_KW = torch.add(grad_KW, old_KW, alpha=centers.momentum_factor, out=out_KW)
            momentum.write(place, grad_KW, centers.generator, keep)
        weight_KW = torch.add(weight_KW, grad_KW, alpha=-self.lr, out=weight_KW if keep is None else None)
        if self.bias_lr != self.lr:
            weight_KW[:, -1].sub_(grad_KW[:, -1], alpha=self.bias_lr - self.lr)
        centers.table.write(where, weight_KW, centers.generator, keep)
        if centers.inverse_C is not None:
            if centers.dtype != centers.work_dtype:  # a rounded row has another length
                weight_KW = centers.table.read(where)
            inverse_K = inverse_of(weight_KW.norm(dim=1))
            centers.inverse_C[where] = (
                inverse_K if keep is None else torch.where(keep, inverse_K, centers.inverse_C[where])
            )

    def _fetched(self, start, stop):
        """The chunk's momentum; the next chunk's is on its way meanwhile."""
        host, (known, fetching) = self.centers.momentum, self._ahead or (None, None)
        if known != start:
            fetching = host.fetch(self._on_host(start, stop))
        after = min(2 * stop - start, self.rows.count)
        self._ahead = (stop, host.fetch(self._on_host(stop, after))) if after > stop else None
        return host.take(fetching)

    def _on_host(self, start, stop):
        return slice(start, stop) if self.index_on_host is None else self.index_on_host[start:stop]
