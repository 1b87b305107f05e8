"""PLSC's learning rate, value for value: the rate follows the total batch, falls at steps, and warms up from `lr`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Callable

BATCH_0_1 = 1024  # the total batch that `lr` is for, in PLSC 0.1
BATCH_2_X = 512  # in arcface_paddle and PLSC 2.x


def steps_per_epoch(train_image_num: int, ranks: int, train_batch_size: int) -> int:
    """From the configured number of images, never from the data; the last batch may be short."""
    return math.ceil(math.ceil(train_image_num / ranks) / train_batch_size)


def base_rate(lr: float, total_batch: int, batch: int = BATCH_0_1) -> float:
    return lr * total_batch / batch


def learning_rate(
    lr: float, base: float, lr_steps: Sequence[int], lr_decay_factor: float = 0.1, warmup_steps: int = 0
) -> Callable[[int], float]:
    """step -> rate. lr_steps count updates, and neither the batch nor the warm-up moves them.

    During the warm-up the rate goes in a straight line from `lr` to `base`, so it falls where the total batch is below
    the one that `lr` is for.
    """
    values = [base * lr_decay_factor**i for i in range(len(lr_steps) + 1)]

    def rate(step: int) -> float:
        if step < warmup_steps:
            return lr + (base - lr) * (step / warmup_steps)
        return values[sum(step >= boundary for boundary in lr_steps)]

    return rate


def learning_rate_2_x(
    base: float, boundaries: Sequence[int], lr_decay: float = 0.1, warmup_steps: int = 0
) -> Callable[[int], float]:
    """arcface_paddle's: the warm-up goes from 0 to `base`."""
    return learning_rate(0.0, base, boundaries, lr_decay, warmup_steps)
