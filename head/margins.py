"""Margins: what a margin loss does to the cosine between an embedding and the center of its own class.

Each is a scalar function with its derivative, `margin(cos_B, ...) -> (value_B, derivative_B)`: the target's logit is
`s * value`, so a margin needs neither the logits nor autograd. A derivative that has no finite value (at |cos| = 1 the
angle's is infinite) is 0: there the embedding points straight at or away from its center, and the cosine's own gradient
is zero.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Callable

import torch

from runtime.errors import ModelError


def softmax(cos_B: torch.Tensor) -> tuple:
    """No margin: the plain softmax over cosines (or, un-normalised, over x W + b)."""
    return cos_B, torch.ones_like(cos_B)


def cosface(cos_B: torch.Tensor, m: float = 0.4) -> tuple:
    """cos - m (arXiv 1801.09414, equation 4)."""
    return cos_B - m, torch.ones_like(cos_B)


def arcface(cos_B: torch.Tensor, m: float = 0.5) -> tuple:
    """cos(angle + m) with its true derivative (arXiv 1801.07698, equation 3).

    Beyond angle = pi - m, where cos(angle + m) would rise again, it goes on as cos - m sin m.
    """
    cos_B, sin_B = _cos_sin(cos_B)
    inside_B = cos_B > -math.cos(m)
    value_B = torch.where(inside_B, cos_B * math.cos(m) - sin_B * math.sin(m), cos_B - m * math.sin(m))
    derivative_B = torch.where(inside_B, math.cos(m) + math.sin(m) * cos_B / sin_B, torch.ones_like(cos_B))
    return value_B, _finite(derivative_B)


def arcface_straight_through(cos_B: torch.Tensor, m: float = 0.5) -> tuple:
    """cos(angle + m) with derivative 1 at every angle, and no other branch beyond pi - m: arcface_torch's."""
    cos_B, sin_B = _cos_sin(cos_B)
    return cos_B * math.cos(m) - sin_B * math.sin(m), torch.ones_like(cos_B)


def combined(cos_B: torch.Tensor, m1: float = 1.0, m2: float = 0.5, m3: float = 0.0) -> tuple:
    """cos(m1 * angle + m2) - m3 with its true derivative (arXiv 1801.07698, equation 4).

    Beyond m1 * angle + m2 = pi it goes on with derivative 1, as `arcface` does, which is the case (1, m, 0).
    """
    cos_B, sin_B = _cos_sin(cos_B)
    turned_B = m1 * torch.acos(cos_B) + m2
    last_cos = math.cos((math.pi - m2) / m1)  # where m1 * angle + m2 reaches pi
    inside_B = cos_B > last_cos
    beyond_B = cos_B - last_cos - math.cos(m2) - m2 * math.sin(m2)
    value_B = torch.where(inside_B, torch.cos(turned_B), beyond_B) - m3
    derivative_B = torch.where(inside_B, m1 * torch.sin(turned_B) / sin_B, torch.ones_like(cos_B))
    return value_B, _finite(derivative_B)


def adaface(cos_B: torch.Tensor, quality_B: torch.Tensor, m: float = 0.4) -> tuple:
    """cos(angle - m * quality) - m * (1 + quality) (arXiv 2204.00964, equation 14).

    quality_B: -1 to 1, from `NormStatistics`: at 1 the margin is on the cosine, at -1 on the angle.
    The turned angle stays within 0..pi; where it had to be cut off the derivative is 0.
    """
    cos_B, sin_B = _cos_sin(cos_B)
    turned_B = torch.acos(cos_B) - m * quality_B
    inside_B = (turned_B > 0) & (turned_B < math.pi)
    value_B = torch.cos(turned_B.clamp(0, math.pi)) - m * (1 + quality_B)
    derivative_B = torch.where(inside_B, torch.sin(turned_B) / sin_B, torch.zeros_like(cos_B))
    return value_B, _finite(derivative_B)


class NormStatistics:
    """Running mean and spread of the embeddings' lengths, and the image quality that AdaFace reads from them.

    h: how many spreads make the quality's full range is 1 / h. alpha: the newest batch's weight in the running values.
    """

    def __init__(self, h: float = 0.333, alpha: float = 0.99):
        self.h, self.alpha = h, alpha
        self.mean_spread = None  # [2], on the embeddings' device: no step waits for the host

    def quality(self, norm_B: torch.Tensor, update: bool = True) -> torch.Tensor:
        """Lengths of the whole batch, all ranks' -> quality_B within -1..1 (arXiv 2204.00964, equations 11 to 13)."""
        norm_B = norm_B.detach().clamp(0.001, 100)
        newest = torch.stack([norm_B.mean(), norm_B.std(unbiased=False)])
        running = newest
        if self.mean_spread is not None:
            before = self.mean_spread.to(newest)
            running = torch.where(torch.isfinite(before), before + self.alpha * (newest - before), newest)
            # one damaged batch must not stay in the statistics for ever, be it the first
            running = torch.where(torch.isfinite(running), running, before)
        if update:
            self.mean_spread = running
        mean, spread = running
        return (self.h * (norm_B - mean) / (spread + 1e-3)).clamp(-1, 1)

    def state(self):
        """[2] on the host, or None before the first batch."""
        return None if self.mean_spread is None else self.mean_spread.detach().cpu().clone()

    def load(self, state) -> None:
        self.mean_spread = None if state is None else torch.as_tensor(state).clone()


@dataclass(frozen=True)
class Margin:
    """One row of the table. `normalised`: logits are s * cosines, or else x W + b with no scale."""

    function: Callable
    parameters: tuple = ()
    normalised: bool = True
    reads_norms: bool = False

    @property
    def reads_lengths(self) -> bool:
        """Whether the embeddings' lengths count, so that a backbone must not normalise them."""
        return self.reads_norms or not self.normalised


MARGINS = {
    "arcface": Margin(arcface, ("m",)),
    "arcface_straight_through": Margin(arcface_straight_through, ("m",)),
    "cosface": Margin(cosface, ("m",)),
    "combined": Margin(combined, ("m1", "m2", "m3")),
    "adaface": Margin(adaface, ("m",), reads_norms=True),
    "softmax": Margin(softmax),
    "linear_softmax": Margin(softmax, normalised=False),
}


def register_margin(name: str, normalised: bool = True, reads_norms: bool = False):
    """Enters a margin of your own as `--loss_type=name`; decorates a function of the target's cosines.

    It is called with cos_B [B], within -1..1 (with reads_norms also with quality_B [B], -1..1, how long the embeddings
    are beside the others': see `NormStatistics`), and returns value_B, which takes the cosine's place in the target's
    logit, by torch operations; or (value_B, derivative_B), to train with another derivative than autograd's.
    A parameter called m is `--margin`, and its default value that option's. normalised=False: cos_B are plain products.

        @head.register_margin("half_angle")
        def half_angle(cos_B, m=0.2):
            return cos_B - m * (1 - cos_B) / 2

    Raises ModelError for a name that is taken.
    """

    def enter(function):
        if name in MARGINS:
            raise ModelError(f"loss_type '{name}': there is one of this name already: choose another")
        parameters = ("m",) if "m" in inspect.signature(function).parameters else ()
        MARGINS[name] = Margin(_differentiated(function), parameters, normalised, reads_norms)
        return function

    return enter


def _differentiated(function):
    def margin(cos_B, *quality_B, **parameters):
        with torch.enable_grad():
            cos_B = cos_B.detach().requires_grad_()
            value_B = function(cos_B, *quality_B, **parameters)
            if isinstance(value_B, tuple):
                value_B, derivative_B = value_B
            else:
                derivative_B = torch.autograd.grad(value_B.sum(), cos_B)[0]
        return value_B.detach(), _finite(derivative_B.detach())

    return margin


def find_margin(name: str) -> Margin:
    """Raises ModelError with the choices for a name that does not exist."""
    if name not in MARGINS:
        raise ModelError(f"margin '{name}': choose from {', '.join(MARGINS)}")
    return MARGINS[name]


def _cos_sin(cos_B):
    cos_B = cos_B.clamp(-1, 1)
    # (1 - c)(1 + c) keeps the digits that 1 - c^2 loses close to 1
    return cos_B, torch.sqrt((1 - cos_B) * (1 + cos_B))


def _finite(derivative_B):
    return torch.where(torch.isfinite(derivative_B), derivative_B, torch.zeros_like(derivative_B))
