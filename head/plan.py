"""What a head costs before it is built: bytes on the device and on the host, a step's traffic, its floor in time.

    python -m head.plan --classes 100e6 --embedding_size 512 --world_size 1 --device_memory 139GiB \\
        --host_memory 112GiB --sample_rate 0.02

prints every storage format of the state, what fits, and up to how many classes. `check` is for the trainer: it refuses
what does not fit before anything is allocated.

The bytes are those that `Centers` and the chunked op allocate; tests hold them to measured peaks. Saving counts too: a
.pth gathers every class in float32 on one host; a sharded checkpoint copies a rank's share to its host, or streams it
from where it is, while the training waits, where the copy does not fit. The floor counts what has to be done and no
overhead: the matrix products at the device's rate, or its memory traffic, or the traffic over the host's link (and, but
for cuda's kernels, which address host memory themselves, through the host's memory), whichever takes longest.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from head.ops.chunked import chunk_rows
from head.sampler import ClassSampler
from head.storage import bytes_per_row
from runtime.errors import ModelError
from runtime.log import Parser, run_command
from runtime.shard import RowShard

logger = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True)
class StorageFormat:
    """How centers and momentum are stored. momentum_dtype None: no momentum."""

    dtype: torch.dtype
    momentum_dtype: torch.dtype | None
    momentum_on_host: bool = False

    @property
    def options(self) -> str:
        """What asks for it on a command line."""
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8", None: "none"}
        return (
            f"--centers_dtype={names[self.dtype]} --momentum_dtype={names[self.momentum_dtype]}"
            f"{' --momentum_on_host' if self.momentum_on_host else ''}"
        )


# From the most exact to the smallest; docs/scaling.md has what each costs in quality.
FORMATS = {
    "fp32 + fp32": StorageFormat(torch.float32, torch.float32),
    "fp32 + bf16": StorageFormat(torch.float32, torch.bfloat16),
    "fp32 + int8": StorageFormat(torch.float32, torch.int8),
    "bf16 + bf16": StorageFormat(torch.bfloat16, torch.bfloat16),
    "bf16 + int8": StorageFormat(torch.bfloat16, torch.int8),
    "bf16 + host fp32": StorageFormat(torch.bfloat16, torch.float32, momentum_on_host=True),
    "bf16 + host bf16": StorageFormat(torch.bfloat16, torch.bfloat16, momentum_on_host=True),
    "bf16 + host int8": StorageFormat(torch.bfloat16, torch.int8, momentum_on_host=True),
    "bf16, no momentum": StorageFormat(torch.bfloat16, None),
}


@dataclass(frozen=True)
class Rates:
    """What the floor assumes of a device, per second; a multiply-add counts twice. The defaults are one H200's."""

    operations: float = 790e12
    memory: float = 4.3e12
    host_link: float = 50e9
    host_memory: float = 50e9
    network: float = 50e9


class Collective(NamedTuple):
    """What the ranks exchange at once. kind: "all_gather", "all_reduce" or "reduce_scatter". size: bytes of the whole
    tensor: what all ranks have after a gather, or each of them before a reduction."""

    what: str
    kind: str
    size: int

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends where they form a ring, which is the least that there is."""
        return (2 if self.kind == "all_reduce" else 1) * (ranks - 1) / ranks * self.size


@dataclass(frozen=True)
class HeadPlan:
    """One rank's share of a head. batch: images of one rank in one forward pass, accumulate: how many of those make an
    update. update_rows: as `MarginHead` takes it. checkpoint: "sharded" or "pth".

    operand_bytes: of an element of the matrix products' operands on the device (2: half precision policies)."""

    classes: int
    embedding_size: int = 512
    world_size: int = 1
    batch: int = 128
    sample_rate: float = 1.0
    form: StorageFormat = FORMATS["fp32 + fp32"]
    update_rows: str = "sampled"
    device_type: str = "cuda"
    operand_bytes: int = 2
    accumulate: int = 1
    checkpoint: str = "sharded"

    @property
    def rows(self) -> int:
        """Of the rank that holds most."""
        return RowShard.of(self.classes, 0, self.world_size).rows

    @property
    def global_batch(self) -> int:
        return self.batch * self.world_size

    @property
    def sampled(self) -> int:
        """Rows that take part in a forward pass."""
        if self.sample_rate == 1:
            return self.rows
        return ClassSampler(self.rows, self.sample_rate, 0, 0).size(self.global_batch)

    @property
    def moved(self) -> int:
        """Rows that the second pass goes over, at most."""
        return self.rows if self.update_rows == "all" else min(self.rows, self.accumulate * self.sampled)

    @property
    def _weight_row(self) -> int:
        return bytes_per_row(self.embedding_size, self.form.dtype)

    @property
    def _momentum_row(self) -> int:
        return bytes_per_row(self.embedding_size, self.form.momentum_dtype)

    @property
    def device_state(self) -> int:
        """Bytes that stay on the device: weight, its inverse length, momentum."""
        return self.rows * (self._weight_row + 4 + (0 if self._on_host else self._momentum_row))

    @property
    def _on_host(self) -> bool:
        return self.form.momentum_on_host and self.device_type != "cpu"

    @property
    def host_state(self) -> int:
        """Bytes in host memory: momentum, its chunks on their way, and the sampled rows' numbers."""
        sample = 32 * self.sampled if self.sampled < self.rows else 0
        if not self._on_host:
            return sample
        return (self.rows + 4 * self._chunk(self.accumulate)) * self._momentum_row + sample

    def _chunk(self, parts: int) -> int:
        return chunk_rows(parts * self.global_batch, self.embedding_size, self.device_type, self.moved)

    @property
    def device_step(self) -> int:
        """Most bytes that a step needs on the device beside the state."""
        width, batch = self.embedding_size, self.global_batch
        images, chunk = self.accumulate * batch, self._chunk(self.accumulate)
        lasting = 4 * images * (width + 8)  # what first passes keep
        if self.sampled < self.rows:
            lasting += 8 * self.accumulate * self.sampled
            if self.accumulate > 1 or self.update_rows == "all":
                lasting += self.moved * (8 + self.accumulate)  # all together, and which was whose
        gathered, low = self.moved < self.rows, self.device_type != "cpu" and self.operand_bytes < 4
        # two [images, chunk] buffers, the chunk's gradient, and the chunk as it is read and as an operand
        second = chunk * (4 * 2 * images + 4 * width * (3 if gathered or low else 1))
        second += 2 * 4 * images * width + chunk * self._arithmetic
        first = self._chunk(1) * (4 * 2 * batch + 4 * width * (2 if gathered or low else 0)) + 5 * 4 * batch * width
        return lasting + max(first, second)

    @property
    def _arithmetic(self) -> int:
        """Temporaries of SGD on a row: float32 copies of what is not float32, the rounding's noise."""
        copies, gathered = 0, self.moved < self.rows
        for dtype in (self.form.dtype, self.form.momentum_dtype):
            if dtype is not None and (gathered or dtype != torch.float32):
                copies += 1 if dtype == torch.float32 else 4
        if self._on_host:
            copies += 3
        return 4 * self.embedding_size * copies

    @property
    def device_bytes(self) -> int:
        return self.device_state + self.device_step

    @property
    def operations(self) -> float:
        """Of the matrix products: two in the first pass, two in the second."""
        return 4.0 * self.global_batch * (self.sampled + self.moved) * self.embedding_size

    @property
    def device_traffic(self) -> float:
        """Bytes of device memory read and written in a step: rows twice, state read and written once more."""
        return float(self.sampled * self._weight_row + self.moved * 2 * (self._weight_row + self._momentum_row))

    @property
    def host_traffic(self) -> float:
        """Bytes over the host's link in a step, each way."""
        return float(self.moved * self._momentum_row) if self._on_host else 0.0

    @property
    def collectives(self) -> tuple:
        """Those of a step of the head, in the order in which it calls them; none on one rank."""
        if self.world_size == 1:
            return ()
        images = self.global_batch
        rows = 4 * images * self.embedding_size
        # gloo has none in most versions of torch: `World.reduce_scatter_rows` reduces on every rank there
        scatter = "all_reduce" if self.device_type == "cpu" else "reduce_scatter"
        return (
            Collective("labels", "all_gather", 8 * images),
            Collective("embeddings", "all_gather", rows),
            Collective("the target's value", "all_reduce", 4 * images),
            Collective("the largest logit, and before filtering", "all_reduce", 2 * 4 * images),
            Collective("sum of exponentials, and how many are better", "all_reduce", 2 * 4 * images),
            Collective("gradient of the embeddings", scatter, rows),
        )

    @property
    def network_traffic(self) -> float:
        """Bytes that a rank sends in a step of the head."""
        return float(sum(collective.sent(self.world_size) for collective in self.collectives))

    def seconds(self, rates: Rates = Rates()) -> float:
        """The floor of a step of the head."""
        return (
            max(
                self.operations / rates.operations,
                self.device_traffic / rates.memory,
                self.host_traffic / rates.host_link,
                # collected into pinned memory and spread again: each row read and written twice
                0.0 if self.device_type == "cuda" else 4 * self.host_traffic / rates.host_memory,
            )
            + self.network_traffic / rates.network
        )

    @property
    def save_bytes(self) -> int:
        """Bytes in host memory without which it cannot be saved. (A sharded checkpoint can be streamed.)"""
        if self.checkpoint != "pth":
            return 0
        tables = 1 if self.form.momentum_dtype is None else 2
        return 4 * tables * self.classes * self.embedding_size

    def fits(self, device_memory: float, host_memory: float) -> bool:
        """On a cpu both are the same memory."""
        on_host = self.host_state + self.save_bytes
        if self.device_type == "cpu":
            return self.device_bytes + on_host <= min(device_memory, host_memory)
        return self.device_bytes <= device_memory and on_host <= host_memory

    def most_classes(self, device_memory: float, host_memory: float) -> int:
        """How many classes would fit, to three digits."""
        fits, too_many = self.world_size, None
        while too_many is None or too_many / fits > 1.001 and too_many - fits > 1:
            middle = fits * 2 if too_many is None else max(fits + 1, math.isqrt(fits * too_many))
            plan = replace(self, classes=middle)
            if plan.fits(device_memory, host_memory) and middle < 2**40:
                fits = middle
            else:
                too_many = middle
        return fits


def table(plan: HeadPlan, device_memory: float, host_memory: float, rates: Rates = Rates()) -> str:
    """Every storage format of the state for that plan, as text. Memory in bytes, of one rank, for the head alone."""
    lines = [
        f"{plan.classes:,} classes x {plan.embedding_size} over {plan.world_size} ranks: {plan.rows:,} rows a rank, "
        f"{plan.sampled:,} sampled a step (sample_rate {plan.sample_rate:g}), batch {plan.batch} a rank; "
        f"for the head {device_memory / GIB:.1f} GiB on the device, {host_memory / GIB:.1f} GiB on the host",
        f"{'centers + momentum':<20}{'B/class':>8}{'state GiB':>11}{'step GiB':>10}{'host GiB':>10}{'fits':>6}"
        f"{'classes that fit':>18}{'memory GB/step':>16}{'link GB/step':>14}{'floor ms':>10}",
    ]
    for name, form in FORMATS.items():
        one = replace(plan, form=form)
        fits = one.fits(device_memory, host_memory)
        lines.append(
            f"{name:<20}{one._weight_row + one._momentum_row:>8}{one.device_state / GIB:>11.2f}"
            f"{one.device_step / GIB:>10.2f}{one.host_state / GIB:>10.2f}{'yes' if fits else 'no':>6}"
            f"{one.most_classes(device_memory, host_memory):>18,}{one.device_traffic / 1e9:>16.2f}"
            f"{one.host_traffic / 1e9:>14.2f}{1e3 * one.seconds(rates):>10.2f}"
        )
    return "\n".join(lines)


def check(plan: HeadPlan, device_memory: float, host_memory: float) -> None:
    """Raises ModelError, and logs the table, where the plan does not fit into those bytes for the head."""
    if plan.fits(device_memory, host_memory):
        return
    logger.error("%s", table(plan, device_memory, host_memory))
    if plan.checkpoint == "pth" and replace(plan, checkpoint="sharded").fits(device_memory, host_memory):
        raise ModelError(
            f"{plan.classes:,} class centers fit, but one .pth of them needs {plan.save_bytes / GIB:.1f} GiB of host "
            f"memory ({max(0, host_memory - plan.host_state) / GIB:.1f} are there): use --checkpoint=sharded"
        )
    fitting = [form for form in FORMATS.values() if replace(plan, form=form).fits(device_memory, host_memory)]
    cure = f"{fitting[0].options} would fit" if fitting else "use more ranks, or a smaller sample_rate"
    raise ModelError(
        f"{plan.classes:,} class centers need {plan.device_bytes / GIB:.1f} GiB on the device "
        f"({device_memory / GIB:.1f} are there for them) and {(plan.host_state + plan.save_bytes) / GIB:.1f} GiB on "
        f"the host ({host_memory / GIB:.1f} are there): {cure}; python -m head.plan shows every choice"
    )


def parse_size(text: str) -> int:
    """ "139GiB", "80G", "512 MB" or a number of bytes -> bytes. Raises ModelError."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    try:
        number = float(match.group(1))
        if not math.isfinite(number):
            raise ValueError
    except (AttributeError, ValueError):
        raise ModelError(f"'{text}' is not a size: write 139GiB, 80GB, or a number of bytes") from None
    power = "kmgt".index(match.group(2)) + 1 if match.group(2) else 0
    return int(number * (1024 if match.group(3) else 1000) ** power)


_MOST = 1 << 20  # of ranks, numbers of an embedding, images, passes


def main(argv=None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--classes", type=float, required=True, help="how many, such as 100e6")
    parser.add_argument("--embedding_size", type=int, default=512)
    parser.add_argument("--world_size", type=int, default=1, help="ranks that share the classes")
    parser.add_argument("--batch_size", type=int, default=128, help="images of one rank")
    parser.add_argument("--sample_rate", type=float, default=1.0)
    parser.add_argument("--accumulate", type=int, default=1, help="forward passes an update")
    parser.add_argument("--checkpoint", choices=("sharded", "pth"), default="sharded")
    parser.add_argument("--device_memory", default="139GiB", help="of one device")
    parser.add_argument("--host_memory", default="112GiB", help="of one rank's share of its machine")
    parser.add_argument("--reserve", default="16GiB", help="device memory kept for backbone and activations")
    for name, value in vars(Rates()).items():
        parser.add_argument(f"--{name}_rate", type=float, default=value, help="a second, for the floor [%(default)g]")
    options = parser.parse_args(argv)
    for name in ("world_size", "embedding_size", "batch_size", "accumulate"):
        if not 1 <= getattr(options, name) <= _MOST:
            raise ModelError(f"--{name} {getattr(options, name)}: must be at least 1 and at most {_MOST:,}")
    if not max(2, options.world_size) <= options.classes < 2**40:
        raise ModelError(f"--classes {options.classes:g}: must be at least 2 and one a rank, and below 2^40")
    if not 0 < options.sample_rate <= 1:
        raise ModelError(f"--sample_rate {options.sample_rate:g}: must be above 0 and at most 1")
    plan = HeadPlan(
        int(options.classes),
        options.embedding_size,
        options.world_size,
        options.batch_size,
        options.sample_rate,
        accumulate=options.accumulate,
        checkpoint=options.checkpoint,
    )
    rates = Rates(**{name: getattr(options, f"{name}_rate") for name in vars(Rates())})
    device_memory = parse_size(options.device_memory) - parse_size(options.reserve)
    sys.stdout.write(table(plan, device_memory, parse_size(options.host_memory), rates) + "\n")


if __name__ == "__main__":
    run_command(main)
