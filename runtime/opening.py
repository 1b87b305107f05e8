"""What a run says when it begins: what it is about to do, in numbers, before the first step is taken."""

from __future__ import annotations

from collections.abc import Sequence

# arcface_torch's configs give 0.1 for 1,024 images and 0.4 for 4,096; in proportion to the batch: arXiv 1706.02677.
USUAL_LR, USUAL_BATCH = 0.1, 1024


def usual_lr(batch_size: int) -> float:
    """The learning rate that the field's published recipes, SGD with momentum, would give for this batch."""
    return USUAL_LR * batch_size / USUAL_BATCH


def opening_lines(
    *,
    network: str,
    parameters: int,
    embedding_size: int,
    loss: str,
    data: str,
    images: int,
    classes: int,
    verified: Sequence[str],
    batch_size: int,
    ranks: int,
    accumulate: int,
    epochs: tuple[int, int],
    steps_per_epoch: int,
    device: str,
    precision: str,
    lr: float,
    lr_course: str,
    weights: str,
    checkpoints: str,
    run_dir: str,
) -> list[str]:
    """The lines, each a word and what it means for this run. Everything counts from 0, as file names and metrics do.

    batch_size: images of one update, all ranks and micro-batches together. epochs: (the first to train, the one after
    the last). lr_course: how the rate goes on, as "x 0.1 from epochs 12, 15, 18 on". weights: where they come from;
    empty for new ones. verified: the names of the pair sets; checkpoints, run_dir: folders.
    """
    first, end = epochs
    each = batch_size // (ranks * accumulate)
    batch = f"{batch_size:,} images an update: {ranks} {'ranks' if ranks > 1 else 'rank'} x {each}"
    span = f"epochs {first} to {end - 1}" if end > first else "no epoch left"
    return [
        f"network  {network}, {parameters / 1e6:.2f} million parameters, embedding {embedding_size}; {loss}",
        f"weights  {weights or 'new, random'}",
        f"data     {data}: {images:,} images of {classes:,} classes; verified on {', '.join(verified) or 'nothing'}",
        f"batch    {batch}{f' x {accumulate} micro-batches' if accumulate > 1 else ''}",
        f"steps    {steps_per_epoch:,} an epoch, {span}: {steps_per_epoch * max(0, end - first):,} in all",
        f"device   {device}, {precision}",
        f"rate     {lr:g}, {lr_course}; the usual rule ({USUAL_LR:g} for {USUAL_BATCH:,} images, in proportion) gives "
        f"{usual_lr(batch_size):.3g}",
        f"output   checkpoints in {checkpoints}, metrics and report in {run_dir}",
    ]
