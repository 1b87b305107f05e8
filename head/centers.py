"""The rows of class centers that this rank holds, their momentum, and their SGD.

The update is torch.optim.SGD's (d = gradient + weight_decay * w; v = momentum * v + d; w -= lr * v), row by row: over
all rows, over the drawn ones alone, or over one chunk inside the backward walk. State belongs with the rows: weight
and momentum move together, in the form in which they are stored.
"""

from __future__ import annotations

import math

import torch

from head.offload import HostTable
from head.ops import accumulate_dtype
from head.storage import ByteTable, FloatTable, Noise, make_table, rows_of
from runtime.errors import ModelError
from runtime.shard import RowShard

STEP_ROWS = 8192  # rows of a step's temporaries
INIT_ROWS = 8192  # rows that are made from one seed
INIT_SALT = 0x5EED_C0DE  # so that the rows are not the numbers that others draw from the same seed

CENTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


class Centers:
    """[rows, width] of `shard`.

    dtype: of the stored weight (bfloat16 and float16 are rounded stochastically). momentum_dtype: float32, bfloat16 or
    int8 (see `ByteTable`); momentum 0 stores none. momentum_on_host: it lives in pinned host memory, and the rows of a
    step travel to the device and back.
    init_norm: length of a fresh row in expectation (1: InsightFace_Pytorch; 0.01 * sqrt(width): arcface_torch).
    A row's start depends on the seed and its global number only, so any number of ranks begins with the same table.
    bias: the last column starts at 0 (the head multiplies it by 1).
    all_rows: decay and momentum move every row at every step, drawn or not, as a dense optimizer does (arcface_torch).
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
        dtype: torch.dtype = torch.float32,
        momentum_dtype: torch.dtype = torch.float32,
        momentum_on_host: bool = False,
        all_rows: bool = False,
        device=None,
    ):
        if dtype not in CENTER_DTYPES:
            raise ModelError(f"centers in {dtype}: choose from {', '.join(map(str, CENTER_DTYPES))}")
        if momentum_dtype not in MOMENTUM_DTYPES:
            raise ModelError(f"momentum in {momentum_dtype}: choose from {', '.join(map(str, MOMENTUM_DTYPES))}")
        self.shard, self.width, self.bias, self.seed = shard, width, bias, seed
        self.momentum, self.weight_decay, self.all_rows = momentum, weight_decay, all_rows
        self.device = torch.device(device or "cpu")
        self.dtype, self.work_dtype = dtype, accumulate_dtype(dtype)
        if dtype == torch.float64 and momentum_dtype == torch.float32:
            momentum_dtype = torch.float64
        self.table = FloatTable(torch.empty(shard.rows, width, dtype=dtype, device=self.device), self.work_dtype)
        self.velocity = None
        if momentum and momentum_on_host:
            pin = self.device.type != "cpu"
            self.velocity = HostTable(
                make_table(shard.rows, width, momentum_dtype, self.work_dtype, "cpu", pin), self.device
            )
        elif momentum:
            self.velocity = make_table(shard.rows, width, momentum_dtype, self.work_dtype, self.device)
        self.updates = 0  # how many there were: the rounding's noise depends on it
        self.pending = []  # rows of this step's forwards that have collected a gradient
        self.spare = None
        self.update_kernel = None  # of an op that has its own: see `HeadOp`
        self._fill(init_norm)

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

    def rows(self, index_R=None, update: Update | None = None, staged=None) -> Rows:
        """The rows of one forward: all of them, or those of index_R (int64, distinct).

        update: applied inside the backward walk; None collects the gradient for `step`. staged: from `stage`."""
        if update is None:
            return CollectedRows(self, index_R, staged)
        return UpdatedRows(self, index_R, staged, update)

    def stage(self, index_R):
        """Starts to bring these rows' momentum to the device where it lives on the host; None elsewhere."""
        return self.velocity.stage(index_R) if isinstance(self.velocity, HostTable) else None

    def begin_update(self, lr: float, inv_scale=1.0, keep=None) -> Update:
        """The arithmetic of the next update. keep: 0-dim bool, False where nothing may change."""
        self.updates += 1
        noise_key = (self.seed * 0x9E3779B1 + self.updates * 0x85EBCA77) % 2**31
        return Update(lr, self.momentum, self.weight_decay, inv_scale, keep, noise_key)

    def found_inf(self) -> torch.Tensor:
        """0-dim float: 1.0 where a collected gradient is not finite."""
        bad = torch.zeros((), device=self.device)
        for rows in self.pending:
            bad = torch.maximum(bad, rows.bad)
        return bad

    def step(self, lr: float, inv_scale=1.0, found_inf=None) -> None:
        """One SGD step with the sum of the collected gradients times inv_scale; drops them.

        It moves the rows that have a gradient, or every row with all_rows. found_inf: 0-dim tensor; where it is 1
        nothing moves."""
        pending, self.pending = self.pending, []
        if pending:
            self._step(pending, lr, inv_scale, found_inf)
        for rows in pending:  # a loss that the caller still holds keeps them alive
            if self.device.type == "cpu" and rows.own_buffer:
                self.spare = rows.grad
            rows.grad = None

    def _step(self, pending, lr, inv_scale, found_inf):
        keep = None
        if found_inf is not None:
            keep = found_inf == 0
            if self.device.type == "cpu":  # asking costs nothing here
                if not keep:
                    self.updates += 1
                    return
                keep = None
        rows, grad_RD = self._sum(pending)
        update = self.begin_update(lr, inv_scale, keep)
        for start in range(0, grad_RD.shape[0], STEP_ROWS):
            stop = min(start + STEP_ROWS, grad_RD.shape[0])
            rows.update(start, stop, grad_RD[start:stop], update)
        rows.put_back()

    def _sum(self, pending):
        """(rows, their gradient) of all the step's forwards together."""
        if len(pending) == 1 and (pending[0].index_R is None or not self.all_rows):
            return pending[0], pending[0].grad
        total = None
        if all(rows.index_R is not None for rows in pending) and not self.all_rows:
            index_R, place_N = torch.unique(torch.cat([rows.index_R for rows in pending]), return_inverse=True)
            rows, places = Rows(self, index_R), place_N.split([rows.count for rows in pending])
        else:
            rows, places = Rows(self, None), [rows.index_R for rows in pending]
        total = torch.zeros(rows.count, self.width, dtype=self.work_dtype, device=self.device)
        for part, place in zip(pending, places):
            if place is None:
                total += part.grad
            else:
                total.index_add_(0, place, part.grad)
        return rows, total

    def gradient_buffer(self, count: int) -> torch.Tensor:
        """[count, width] to be filled. On a CPU the last step's memory again: fresh gigabytes cost it as much as the
        arithmetic, while a device's allocator keeps them at hand, and may lend them to the backbone meanwhile."""
        spare, self.spare = self.spare, None
        if spare is not None and spare.shape[0] == count:
            return spare
        return torch.empty(count, self.width, dtype=self.work_dtype, device=self.device)

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
        if self.velocity is not None:
            state.update({f"momentum{name}": t for name, t in self.velocity.tensors().items()})
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
        self.weight.copy_(state["weight"])
        if self.velocity is None:
            return
        tensors = self.velocity.tensors()
        momentum, scale = state["momentum"], state["momentum_scale"]
        if momentum is not None and momentum.dtype == tensors[""].dtype:
            tensors[""].copy_(momentum)
            if scale is not None:
                tensors["_scale"].copy_(scale)
        else:
            if scale is not None:
                momentum = ByteTable(momentum, scale, self.work_dtype)
            elif momentum is not None:
                momentum = FloatTable(momentum, self.work_dtype)
            self.load_momentum(momentum)

    def momentum_rows(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, width] in the work dtype, counted within this rank."""
        return self._momentum_table().read(slice(start, stop))

    def load_momentum(self, table) -> None:
        """Momentum of all of this rank's rows: another table or a tensor [rows, width]; None is zero."""
        if self.velocity is None:
            return
        mine = self._momentum_table()
        for start in range(0, self.shard.rows, STEP_ROWS):
            where = slice(start, min(start + STEP_ROWS, self.shard.rows))
            if table is None:
                rows = torch.zeros(where.stop - start, self.width, dtype=self.work_dtype)
            else:
                rows = table[where] if torch.is_tensor(table) else table.read(where)
            device = mine.tensors()[""].device
            noise = Noise(0, where, self.shard.start, device)
            mine.write(where, rows.to(device=device, dtype=self.work_dtype), noise)

    def _momentum_table(self):
        if isinstance(self.velocity, HostTable):
            self.velocity.flush()
            return self.velocity.table
        return self.velocity


class Update:
    """SGD's arithmetic, in place on a few rows. keep: 0-dim bool; where it is False nothing changes."""

    def __init__(self, lr, momentum, weight_decay, inv_scale=1.0, keep=None, noise_key=0):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.inv_scale, self.keep, self.noise_key = inv_scale, keep, noise_key

    def __call__(self, weight_KW, velocity_KW, grad_KW) -> None:
        """velocity_KW: None without momentum. grad_KW is used up."""
        if torch.is_tensor(self.inv_scale) or self.inv_scale != 1:
            grad_KW.mul_(self.inv_scale)
        if self.keep is None:
            if self.weight_decay:
                grad_KW.add_(weight_KW, alpha=self.weight_decay)
            if velocity_KW is not None:
                grad_KW = velocity_KW.mul_(self.momentum).add_(grad_KW)
            weight_KW.add_(grad_KW, alpha=-self.lr)
            return
        # the same with factors that are tensors: the host does not learn whether the step counts
        keep = self.keep.to(grad_KW.dtype)
        grad_KW.masked_fill_(~self.keep, 0)
        grad_KW.addcmul_(weight_KW, keep * self.weight_decay)
        if velocity_KW is not None:
            grad_KW = velocity_KW.mul_(keep * self.momentum + (1 - keep)).add_(grad_KW)
        weight_KW.addcmul_(grad_KW, keep * -self.lr)


class Rows:
    """The centers of one forward, as an op sees them: [count, width] to read piece by piece, and a place for their
    gradient: `begin` gives a buffer for some rows, and `end` says that it is filled, the gradient being
    scale_K * buffer - along_K * weight (None: 1 and 0)."""

    def __init__(self, centers: Centers, index_R=None, staged=None):
        self.centers, self.index_R, self.staged = centers, index_R, staged
        self.count = centers.shard.rows if index_R is None else index_R.shape[0]
        self.width, self.work_dtype = centers.width, centers.work_dtype
        # (start, stop, version), rows: what was read for the products serves the update too
        self._last_read = None, None

    @property
    def version(self) -> int:
        """Changes with every write to the centers."""
        return self.centers.weight._version

    def read(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, width] in the stored dtype; not to be written to."""
        if self._last_read[0] != (start, stop, self.version):
            self._last_read = (start, stop, self.version), rows_of(self.centers.weight, self._where(start, stop))
        return self._last_read[1]

    def take(self, place_B: torch.Tensor) -> torch.Tensor:
        """[B, width] in the stored dtype, by places among these rows."""
        return rows_of(self.centers.weight, place_B if self.index_R is None else self.index_R[place_B])

    # Whether an op has to keep what is not finite out of the gradient: there is no later moment to skip the step.
    at_once = False

    def guard(self, finite: torch.Tensor) -> None:
        """Called before the first gradient: whether all of them are going to be finite, 0-dim bool."""

    def take_gradient(self, grad_RW: torch.Tensor) -> None:
        """The gradient of all rows in one piece, which is handed over."""
        self.begin(0, self.count).copy_(grad_RW)
        self.end(0, self.count)

    def update(self, start, stop, grad_KW, update: Update, scale_K=None, along_K=None) -> None:
        """SGD on rows start:stop with the gradient scale_K * grad_KW - along_K * weight. grad_KW is used up."""
        centers, where = self.centers, self._where(start, stop)
        velocity, place = centers.velocity, where
        if isinstance(velocity, HostTable):
            if self.staged is None:
                self.staged = velocity.stage(self.index_R)
            velocity, place = self.staged.table(), slice(start, stop)
        if centers.update_kernel is not None:
            centers.update_kernel(
                grad_KW, centers.table, where, velocity, place, scale_K, along_K, update, centers.shard.start
            )
            return
        noise = Noise(update.noise_key, where, centers.shard.start, centers.device)
        weight_KW = self.read(start, stop).to(self.work_dtype)
        velocity_KW = None if velocity is None else velocity.read(place)
        _close(grad_KW, weight_KW, scale_K, along_K)
        update(weight_KW, velocity_KW, grad_KW)
        centers.table.write(where, weight_KW, noise)
        if velocity is not None:
            velocity.write(place, velocity_KW, noise.other())

    def put_back(self) -> None:
        """All rows of the step are done: momentum that lives on the host goes home."""
        if self.staged is not None:
            self.staged.give_back()
            self.staged = None

    def _where(self, start, stop):
        return slice(start, stop) if self.index_R is None else self.index_R[start:stop]


class CollectedRows(Rows):
    """Keeps the gradient, [count, width], until the step."""

    def __init__(self, centers, index_R=None, staged=None):
        super().__init__(centers, index_R, staged)
        self.grad, self.own_buffer = None, True
        self.more = None  # a piece of another backward through the same forward, which adds up
        self.bad = torch.zeros((), device=centers.device)
        self.averaged = False  # over the ranks, where they hold copies

    def begin(self, start, stop):
        if start == 0 and self.grad is not None or self.more is not None:
            self.more = torch.empty(stop - start, self.width, dtype=self.work_dtype, device=self.centers.device)
            return self.more
        if self.grad is None:
            self.grad = self.centers.gradient_buffer(self.count)
            self.centers.pending.append(self)
        return self.grad[start:stop]

    def end(self, start, stop, scale_K=None, along_K=None):
        filled_KW = self.grad[start:stop] if self.more is None else self.more
        if scale_K is not None or along_K is not None:
            _close(filled_KW, self.read(start, stop).to(self.work_dtype), scale_K, along_K)
        if self.more is not None:
            self.grad[start:stop] += self.more
            if stop == self.count:
                self.more = None
        if stop == self.count:
            self._last_read = None, None
        # read while it is warm; a sum is finite only if every term is
        total = self.grad[start:stop].sum()
        self.bad = torch.maximum(self.bad, (~torch.isfinite(total)).to(self.bad.dtype))

    def take_gradient(self, grad_RW):
        if self.grad is not None:
            return super().take_gradient(grad_RW)
        self.grad, self.own_buffer = grad_RW, False
        self.centers.pending.append(self)
        self.end(0, self.count)


class UpdatedRows(Rows):
    """Applies each piece's gradient at once: no gradient of the centers ever exists."""

    def __init__(self, centers, index_R, staged, update):
        super().__init__(centers, index_R, staged)
        self.arithmetic = update
        self.buffer = None

    at_once = True

    def guard(self, finite):
        on_host = finite.device.type == "cpu"  # where asking costs nothing
        self.arithmetic.keep = None if on_host and finite else finite

    def begin(self, start, stop):
        if self.buffer is None or self.buffer.shape[0] < stop - start:
            self.buffer = torch.empty(stop - start, self.width, dtype=self.work_dtype, device=self.centers.device)
        return self.buffer[: stop - start]

    def end(self, start, stop, scale_K=None, along_K=None):
        self.update(start, stop, self.buffer[: stop - start], self.arithmetic, scale_K, along_K)
        if stop == self.count:
            self.put_back()
            self.buffer, self._last_read = None, (None, None)


def _close(grad_KW, weight_KW, scale_K, along_K):
    if scale_K is not None:
        grad_KW.mul_(scale_K[:, None])
    if along_K is not None:
        grad_KW.addcmul_(weight_KW, along_K[:, None], value=-1)
