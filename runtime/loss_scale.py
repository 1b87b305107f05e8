"""The factor that keeps small fp16 gradients from becoming zero: PLSC's six parameters, carried out on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from runtime.errors import PrecisionError


@dataclass(frozen=True)
class LossScaling:
    """PLSC's six parameters of loss scaling, with its meaning; policies without fp16 do not scale.

    After incr_every_n_steps good steps in a row the scale is multiplied by incr_ratio, after decr_every_n_nan_or_inf
    bad steps in a row by decr_ratio, though not below 1 (or below init_loss_scaling, where that is smaller).
    use_dynamic_loss_scaling=False: the scale stays init_loss_scaling, and the other four say nothing.
    """

    init_loss_scaling: float = 2.0**16
    incr_every_n_steps: int = 2000
    decr_every_n_nan_or_inf: int = 2
    incr_ratio: float = 2.0
    decr_ratio: float = 0.5
    use_dynamic_loss_scaling: bool = True

    def __post_init__(self) -> None:
        allowed = {
            "init_loss_scaling": (0 < self.init_loss_scaling < math.inf, "a positive number such as 128.0"),
            "incr_every_n_steps": (self.incr_every_n_steps >= 1, "1 or more steps"),
            "decr_every_n_nan_or_inf": (self.decr_every_n_nan_or_inf >= 1, "1 or more steps"),
            "incr_ratio": (1 < self.incr_ratio < math.inf, "more than 1"),
            "decr_ratio": (0 < self.decr_ratio < 1, "between 0 and 1"),
        }
        for name, (good, wanted) in allowed.items():
            if not good:
                raise PrecisionError(f"{name} {getattr(self, name)}: give {wanted}")

    @property
    def smallest(self) -> float:
        """The scale under which it does not fall."""
        return min(1.0, self.init_loss_scaling) if self.use_dynamic_loss_scaling else self.init_loss_scaling


DYNAMIC = LossScaling()


def parse_loss_scale(text: str | float, **six) -> LossScaling:
    """A fixed scale ("128.0"), or "dynamic": dynamic scaling with PLSC's parameters `six` (LossScaling's fields).

    Raises PrecisionError in one line for anything else: 0, a negative number, a word.
    """
    scaling = LossScaling(**six)
    if str(text).strip().lower() == "dynamic":
        return replace(scaling, use_dynamic_loss_scaling=True)
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value < math.inf:
        raise PrecisionError(f"loss_scale '{text}': give a positive number such as 128.0, or 'dynamic'")
    return replace(scaling, init_loss_scaling=value, use_dynamic_loss_scaling=False)


class LossScale:
    """The scale and its counters as 0-dim fp32 tensors on the device, so that no step waits for the host."""

    def __init__(self, scaling: LossScaling, device: torch.device) -> None:
        self.scaling = scaling
        self.value = torch.tensor(float(scaling.init_loss_scaling), device=device)
        self.good, self.bad = torch.zeros((), device=device), torch.zeros((), device=device)

    def at_smallest(self) -> torch.Tensor:
        """0-dim fp32: 1.0 where the scale cannot fall further."""
        return (self.value <= self.scaling.smallest).float()

    def adjust(self, found_inf: torch.Tensor) -> None:
        """The dynamic scale after a step; equals torch.amp.GradScaler's where decr_every_n_nan_or_inf is 1.

        found_inf: 0-dim, 0.0 or 1.0."""
        rules = self.scaling
        if not rules.use_dynamic_loss_scaling:
            return
        self.good = (self.good + 1) * (1 - found_inf)
        self.bad = (self.bad + 1) * found_inf
        grow, shrink = self.good >= rules.incr_every_n_steps, self.bad >= rules.decr_every_n_nan_or_inf
        larger, smaller = self.value * rules.incr_ratio, (self.value * rules.decr_ratio).clamp(min=rules.smallest)
        grown = torch.where(grow & torch.isfinite(larger), larger, self.value)
        self.value = torch.where(shrink, smaller, grown)
        self.good, self.bad = self.good * ~grow, self.bad * ~shrink
