"""The classification head: class centers sharded over the ranks by rows, a margin, and their own SGD.

It is no part of the torch optimizer and of no use to DistributedDataParallel: its rows, their gradient and their
momentum never leave the rank that holds them. One rank is the trivial shard, and the same code.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from head.centers import Centers, Update
from head.margins import NormStatistics, find_margin
from head.ops import Kept, LossSpec, accumulate_dtype, margin_loss
from head.ops.choose import choose_op
from head.sampler import ClassSampler
from runtime.dist import ALONE
from runtime.errors import ModelError
from runtime.shard import RowShard


class HeadOutput(NamedTuple):
    """loss: the global batch's mean, the same on every rank. correct, correct_top5: how many of the global batch have
    their own class (of those that took part) as the best, or among the five best, without margin; 0-dim tensors."""

    loss: torch.Tensor
    correct: torch.Tensor
    correct_top5: torch.Tensor | None = None


class MarginHead(nn.Module):
    """Embeddings and labels in, loss out.

    margin: a name of `head.margins.MARGINS`; m: its own default if None; combined: (m1, m2, m3) of "combined".
    s: scale of the cosines ("linear_softmax", x W + b, has none).
    world: the ranks that share the classes. sharded=False: every rank holds all centers and sees its own images only,
    and their gradients are averaged (data parallel; PLSC's `arcface` and `softmax`).
    op: a name of `head.ops`; "auto" tries, on an accelerator and with batch (images of a rank) given, what runs there
    on the head's own shape, and keeps the quickest; `trials` says what it saw.
    operand: dtype of the matrix products' operands, from the precision policy. skip: see `LossSpec`.
    sample_rate: share of a rank's centers that takes part in a training step (Partial FC, `head.sampler`).
    update_rows: "sampled" moves the sampled centers only, "all" decays and moves every one, as arcface_torch does.
    interclass_filtering_threshold: a cosine with another class above it counts as 0 (noisy labels; 0 = off).
    momentum, weight_decay, init_norm, dtype, momentum_dtype, momentum_on_host: of the centers, see `Centers`.
    top5: count the five best too.

    Gradients: the embeddings get those of the global mean times world.size, because DistributedDataParallel averages
    over the ranks; the centers' own gradient is complete, and exists a chunk at a time, in `step`. Several forwards and
    backwards before a step add up. In eval mode all centers take part.
    Raises ModelError, one line, for arguments that do not fit together.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int = 512,
        margin: str = "arcface",
        s: float = 64.0,
        m: float | None = None,
        combined: tuple = (1.0, 0.5, 0.0),
        world=ALONE,
        sharded: bool = True,
        op: str = "auto",
        sample_rate: float = 1.0,
        batch: int | None = None,
        operand: torch.dtype = torch.float32,
        skip: bool = True,
        update_rows: str = "sampled",
        interclass_filtering_threshold: float = 0.0,
        top5: bool = False,
        seed: int = 0,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        init_norm: float = 1.0,
        device=None,
        dtype: torch.dtype = torch.float32,
        momentum_dtype: torch.dtype = torch.float32,
        momentum_on_host: bool = False,
    ):
        super().__init__()
        kind = find_margin(margin)
        _check_arguments(
            num_classes, margin, kind, world, sharded, sample_rate, update_rows, interclass_filtering_threshold
        )
        self.num_classes, self.embedding_size, self.margin, self.sharded = num_classes, embedding_size, margin, sharded
        self.world, self.device = world, torch.device(device or "cpu")
        self._host_world = replace(world, group=world.host_group, device=torch.device("cpu"))
        self.norms = NormStatistics() if kind.reads_norms else None
        parameters = dict(zip(("m1", "m2", "m3"), combined)) if margin == "combined" else {}
        if m is not None and "m" in kind.parameters:
            parameters["m"] = m
        self.margin_function = partial(kind.function, **parameters)
        self.spec = LossSpec(
            margin=self._margin,
            s=s if kind.normalised else 1.0,
            normalise=kind.normalised,
            filter_above=interclass_filtering_threshold,
            operand=operand,
            top5=top5,
            skip=skip,
        )
        self.bias = not kind.normalised
        self._class_world = world if sharded else ALONE
        shard = RowShard.of(num_classes, self._class_world.rank, self._class_world.size)
        self.centers = Centers(
            shard,
            embedding_size + self.bias,
            momentum=momentum,
            weight_decay=weight_decay,
            seed=seed,
            init_norm=init_norm,
            bias=self.bias,
            normalise=kind.normalised,
            dtype=dtype,
            device=self.device,
            momentum_dtype=momentum_dtype,
            momentum_on_host=momentum_on_host,
            host_threads=max(1, (os.cpu_count() or 1) // world.local_size),
        )
        self.all_rows = update_rows == "all"
        self.sampler = ClassSampler(shard.rows, sample_rate, seed, shard.start) if sample_rate < 1 else None
        self.draws = 0  # how often rows were sampled: the next sample depends on it
        self._prepared = None
        self._pending = []  # (sample, kept) of every backward since the last step
        share = self.centers.rows()
        if self.sampler is not None and batch:
            rows = self.sampler.size(batch * self._class_world.size)
            share = self.centers.rows(torch.arange(rows, device=self.device) if rows < shard.rows else None)
        self.op, self.trials = choose_op(op, self.device, share, self.spec, world, batch)

    def extra_repr(self) -> str:
        shard = self.centers.shard
        return (
            f"{self.margin}, classes {shard.start}:{shard.stop} of {self.num_classes}, "
            f"embedding_size={self.embedding_size}, op={self.op.name}"
        )

    def forward(self, emb_BD: torch.Tensor, labels_B: torch.Tensor) -> HeadOutput:
        """emb_BD: [B, embedding_size] of any floating dtype, not normalised. labels_B: int64. The same B on every rank.

        A label outside 0..num_classes-1 raises ModelError on a CPU, and on a device, which is not waited for, gives a
        loss that is not a number."""
        self._check(emb_BD, labels_B)
        emb_BD = emb_BD.to(accumulate_dtype(self.centers.dtype))
        if torch.is_grad_enabled() and not emb_BD.requires_grad:
            emb_BD = emb_BD.detach().requires_grad_()  # backward has to run for the centers' sake
        if self.sharded:
            emb_BD = _Gather.apply(emb_BD, self.world)
        if self.bias:
            emb_BD = torch.cat([emb_BD, torch.ones_like(emb_BD[:, :1])], dim=1)
        sample, self._prepared = self._prepared or self._sample(labels_B), None
        rows, keep = self.centers.rows(sample.index_R), partial(self._keep, sample)
        result = margin_loss(self.op, emb_BD, rows, sample.place_B, self.spec, self._class_world, keep)
        loss = result.loss_B.mean()
        correct = result.top1_B.sum()
        correct_top5 = None if result.top5_B is None else result.top5_B.sum()
        if not self.sharded and self.world.size > 1:
            loss, correct, correct_top5 = self._over_ranks(loss, correct, correct_top5)
        return HeadOutput(loss, correct, correct_top5)

    def prepare(self, labels_B: torch.Tensor) -> None:
        """Optional, before the backbone's forward, with the labels of the next forward: samples its centers, beside
        what the device still computes. With labels in host memory nothing waits for the device."""
        self._check_labels(labels_B)
        self._prepared = self._sample(labels_B)

    def _sample(self, labels_B) -> _Sample:
        sampling = self.sampler is not None and self.training
        labels_B = labels_B.cpu() if sampling else labels_B
        if self.sharded:
            labels_B = (self._host_world if labels_B.device.type == "cpu" else self.world).all_gather(labels_B)
        shard = self.centers.shard
        column_B = torch.where(shard.owns(labels_B), shard.local(labels_B), torch.full_like(labels_B, -1))
        if not sampling:
            return _Sample(None, self._on_device(column_B), None)
        index_R, place_B = self.sampler(column_B.numpy(), self.draws)
        self.draws += 1
        if index_R is None:
            return _Sample(None, self._on_device(column_B), None)
        on_host = torch.from_numpy(index_R)
        return _Sample(self._on_device(on_host), self._on_device(torch.from_numpy(place_B)), on_host)

    def _on_device(self, t):
        if self.device.type == "cpu" or t.device.type != "cpu":
            return t
        return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t).to(self.device, non_blocking=True)

    def _keep(self, sample, kept: Kept) -> None:
        self._pending.append((sample, kept))

    def _margin(self, target_B, norm_B):
        if self.norms is None:
            return self.margin_function(target_B)
        if not self.sharded:
            everyone_N = self.world.all_gather(norm_B)
            quality_N = self.norms.quality(everyone_N, self.training)
            start = self.world.rank * norm_B.shape[0]
            return self.margin_function(target_B, quality_N[start : start + norm_B.shape[0]])
        return self.margin_function(target_B, self.norms.quality(norm_B, self.training))

    def _over_ranks(self, loss, correct, correct_top5):
        """The values of the global batch; the gradient stays the local mean's, which is what averaging ranks want."""
        mean = self.world.all_reduce_(loss.detach().clone()) / self.world.size
        counts = [self.world.all_reduce_(count) for count in (correct, correct_top5) if count is not None]
        return loss + (mean - loss.detach()), counts[0], counts[1] if len(counts) > 1 else None

    def _check(self, emb_BD, labels_B):
        if emb_BD.dim() != 2 or emb_BD.shape[1] != self.embedding_size or labels_B.shape != emb_BD.shape[:1]:
            raise ModelError(
                f"the head takes embeddings [B, {self.embedding_size}] and labels [B], "
                f"got {list(emb_BD.shape)} and {list(labels_B.shape)}"
            )
        self._check_labels(labels_B)

    def _check_labels(self, labels_B):
        if labels_B.device.type == "cpu" and labels_B.numel():
            low, high = int(labels_B.min()), int(labels_B.max())
            if low < 0 or high >= self.num_classes:
                raise ModelError(f"label {low if low < 0 else high}: the head has classes 0 to {self.num_classes - 1}")

    # --- the update --------------------------------------------------------------------------------------------------

    def found_inf(self) -> torch.Tensor:
        """0-dim float tensor, 1.0 if what the update needs (embeddings, loss, incoming gradient) is not finite; from
        finite ones it cannot become anything else (`head.ops.chunked`). Reduce it (max) over the ranks before step: all
        of them have to skip together."""
        bad = torch.zeros((), device=self.device)
        for _, kept in self._pending:
            for t in (kept.unit_BD, kept.lse_B, kept.minus_B, kept.grad_B):
                bad = torch.maximum(bad, (~torch.isfinite(t).all()).to(bad.dtype))
        return bad

    def step(self, lr: float, inv_scale=1.0, found_inf=None) -> None:
        """SGD with momentum and weight decay on this rank's centers, in the second pass over them, with the gradient of
        all backwards since the last step.

        inv_scale: 1 / loss scale, a float or a 0-dim tensor. found_inf: 0-dim tensor; where it is 1 nothing moves."""
        pending, self._pending = self._pending, []
        self.centers.updates += 1  # also of a step that is skipped: the rounding's noise depends on it
        keep = None if found_inf is None else found_inf == 0
        if keep is not None and self.device.type == "cpu":  # asking costs nothing there
            if not keep:
                return
            keep = None
        if pending:
            with torch.no_grad():
                sample, kept = self._joined(pending)
                kept = replace(kept, grad_B=kept.grad_B * inv_scale)
                if not self.sharded:
                    kept = self._of_all_ranks(kept)
                update = Update(self.centers, lr, sample.index_R, sample.on_host, keep, self.op.update_rows)
                self.op.second(kept, update.rows, self.spec, update)

    def _joined(self, pending) -> tuple:
        """One sample and one Kept for all of a step's forward passes: their images together, over all of their rows."""
        if len(pending) == 1 and (pending[0][0].on_host is None or not self.all_rows):
            return pending[0]
        samples, kepts = zip(*pending)
        wholes = {
            name: torch.cat([getattr(kept, name) for kept in kepts])
            for name in ("unit_BD", "lse_B", "minus_B", "column_B", "grad_B")
        }
        if all(sample.on_host is None for sample in samples):
            return samples[0], Kept(**wholes)
        union = None
        if not self.all_rows and all(sample.on_host is not None for sample in samples):
            union = np.unique(np.concatenate([sample.on_host.numpy() for sample in samples]))
        count = self.centers.shard.rows if union is None else len(union)
        member_NR = torch.ones(len(pending), count, dtype=torch.bool, device=self.device)
        columns = []
        for member_R, sample in zip(member_NR, samples):
            column_B = sample.place_B
            if sample.on_host is not None:
                place_R = sample.on_host if union is None else np.searchsorted(union, sample.on_host.numpy())
                place_R = self._on_device(torch.as_tensor(place_R))
                member_R.fill_(False).index_fill_(0, place_R, True)
                column_B = torch.where(column_B >= 0, place_R[column_B.clamp(min=0)], column_B)
            columns.append(column_B)
        wholes["column_B"] = torch.cat(columns)
        part_B = torch.cat([torch.full_like(column_B, i) for i, column_B in enumerate(columns)])
        on_host = None if union is None else torch.from_numpy(union)
        sample = _Sample(None if union is None else self._on_device(on_host), None, on_host)
        return sample, Kept(**wholes, member_NR=member_NR, part_B=part_B)

    def _of_all_ranks(self, kept: Kept) -> Kept:
        """Replicated centers: every rank's images, and the mean of the ranks' gradients: all copies move alike."""
        gathered = {name: self.world.all_gather(t) for name, t in vars(kept).items() if t is not None}
        return Kept(**{**gathered, "grad_B": gathered["grad_B"] / self.world.size})

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def local_state(self) -> dict:
        """This rank's rows as they are stored (tensors are not copied), and what else the next step depends on."""
        return {**self.centers.state(), "draws": self.draws, "norms": self.norms and self.norms.state()}

    def load_local_state(self, state: dict) -> None:
        """What `local_state` gave on the same rank of as many. Raises ModelError for another part or shape."""
        with torch.no_grad():
            self.centers.load_state(state)
        self.draws = int(state["draws"])
        if self.norms is not None:
            self.norms.load(state["norms"])

    def gathered_kernel(self, max_bytes: int = 64 * 2**20):
        """All centers as [embedding_size, num_classes] float32 on rank 0's host, None on the others.

        They travel in pieces of at most max_bytes. All ranks have to call it."""
        return self._gathered(self.centers.table, slice(0, self.embedding_size), max_bytes)

    def gathered_training_state(self, max_bytes: int = 64 * 2**20) -> dict:
        """What `gathered_kernel` leaves out, for a checkpoint in one file: momentum [width, num_classes] and bias
        [1, num_classes] float32 on rank 0's host (None on the others, or where there is none), and plain values."""
        momentum = bias = None
        if self.centers.momentum is not None:
            momentum = self._gathered(self.centers.momentum_table(), slice(None), max_bytes)
        if self.bias:
            bias = self._gathered(self.centers.table, slice(self.embedding_size, None), max_bytes)
        return {
            "momentum": momentum,
            "bias": bias,
            "draws": self.draws,
            "updates": self.centers.updates,
            "norms": self.norms and self.norms.state(),
        }

    def _gathered(self, table, columns, max_bytes):
        """Pieces of the ranks' tables [n, width], transposed, on rank 0."""
        world, width = self._class_world, self.centers.width
        whole = None
        if self.world.is_main:
            whole = torch.empty(len(range(width)[columns]), self.num_classes, dtype=torch.float32)
        piece = max(1, max_bytes // (4 * width))
        for owner in range(world.size):
            shard = RowShard.of(self.num_classes, owner, world.size)
            for start in range(shard.start, shard.stop, piece):
                stop = min(start + piece, shard.stop)
                if world.rank == owner:
                    rows = table.read(slice(start - shard.start, stop - shard.start))
                    rows = rows.to(device=self.device, dtype=torch.float32).contiguous()
                else:
                    rows = torch.empty(stop - start, width, dtype=torch.float32, device=self.device)
                world.broadcast_(rows, src=owner)
                if whole is not None:
                    whole[:, start:stop] = rows[:, columns].t().cpu()
        return whole

    def load_kernel(self, kernel_DC: torch.Tensor) -> None:
        """[embedding_size, num_classes], as `gathered_kernel` gives it: each rank takes its rows. Momentum starts anew.

        Raises ModelError where the shape is another one."""
        if tuple(kernel_DC.shape) != (self.embedding_size, self.num_classes):
            raise ModelError(
                f"head kernel: expected [{self.embedding_size}, {self.num_classes}] (embedding size, "
                f"classes), got {list(kernel_DC.shape)}"
            )
        with torch.no_grad():
            self.centers.weight[:, : self.embedding_size] = self._own(kernel_DC)
            self.centers.measure()
            self.centers.load_momentum(None)

    def load_training_state(self, state: dict) -> None:
        """What `gathered_training_state` gave on rank 0; each rank takes its rows."""
        with torch.no_grad():
            self.centers.load_momentum(None if state["momentum"] is None else self._own(state["momentum"]))
            if self.bias and state["bias"] is not None:
                self.centers.weight[:, self.embedding_size :] = self._own(state["bias"])
        self.draws, self.centers.updates = int(state["draws"]), int(state["updates"])
        if self.norms is not None:
            self.norms.load(state["norms"])

    def _own(self, table_DC):
        return table_DC[:, self.centers.shard.slice].t()


class _Sample(NamedTuple):
    """The rows of one forward: index_R on the device, None for all of them; place_B, where each image's class stands
    among them; on_host, index_R in host memory."""

    index_R: torch.Tensor | None
    place_B: torch.Tensor | None
    on_host: torch.Tensor | None


def _check_arguments(num_classes, margin, kind, world, sharded, sample_rate, update_rows, filtering):
    if num_classes < 2 or (sharded and num_classes < world.size):
        raise ModelError(f"num_classes {num_classes}: needs at least 2, and as many as ranks share them ({world.size})")
    if not 0 < sample_rate <= 1:
        raise ModelError(f"sample_rate {sample_rate}: must be above 0 and at most 1")
    if update_rows not in ("sampled", "all"):
        raise ModelError(f"update_rows '{update_rows}': choose from sampled, all")
    if filtering and not kind.normalised:
        raise ModelError(f"interclass_filtering_threshold reads cosines, and margin '{margin}' has none")
    if not sharded and world.size > 1 and sample_rate < 1:
        raise ModelError("sample_rate below 1 needs sharded centers: every rank's copy has to get the same update")


class _Gather(torch.autograd.Function):
    """All ranks' embeddings; backward sums what each rank's centers say about this rank's own."""

    @staticmethod
    def forward(ctx, emb_BD, world):
        ctx.world = world
        return world.all_gather(emb_BD.detach())

    @staticmethod
    def backward(ctx, grad_BD):
        return ctx.world.reduce_scatter_rows(grad_BD) * ctx.world.size, None
