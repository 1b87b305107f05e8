"""A module whose training step is recorded once and replayed: for devices that have such graphs and no compiler."""

from __future__ import annotations

import copy
import logging
import time

import torch
from torch import nn

logger = logging.getLogger(__name__)

TRIALS = 5  # forward and backward passes by which replay and eager are compared


class Captured(nn.Module):
    """Trains as `module`, whose parameters and buffers it shares, and replays its forward and backward.

    The first batch in training is what is recorded, and batches of its shape and type are replayed; others run eagerly,
    as does evaluation. Recording runs the module a few times on that batch and leaves its buffers and the random
    numbers as they were. Then both ways are timed, and the slower one is dropped.

    device: a runtime.device.Device. record: its make_graphed_callables.
    """

    def __init__(self, module: nn.Module, device, record):
        super().__init__()
        self.module, self._device, self._record = module, device, record
        self._replay, self._recorded = None, None

    def forward(self, images):
        if not (self.training and torch.is_grad_enabled()):
            return self.module(images)
        if self._recorded is None:
            self._choose(images)
        same = self._recorded == (images.shape, images.dtype)
        return self._replay(images) if self._replay is not None and same else self.module(images)

    def _choose(self, images) -> None:
        buffers, random = [buffer.clone() for buffer in self.module.buffers()], self._device.rng_state()
        # record() changes the forward of the module that it is given; the module itself stays eager
        replay = self._record(copy.copy(self.module), (images.clone(),))
        seconds = {name: self._seconds(run, images) for name, run in (("eager", self.module), ("replayed", replay))}
        with torch.no_grad():
            for buffer, before in zip(self.module.buffers(), buffers):
                buffer.copy_(before)
        self._device.set_rng_state(random)
        self._recorded = images.shape, images.dtype
        self._replay = replay if seconds["replayed"] < seconds["eager"] else None
        logger.info(
            "static: forward and backward take %.2f ms replayed and %.2f ms eager: %s",
            1000 * seconds["replayed"],
            1000 * seconds["eager"],
            "replayed" if self._replay is not None else "eager",
        )

    def _seconds(self, run, images) -> float:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        for trial in range(TRIALS + 1):
            if trial == 1:  # the first one warms up
                self._device.synchronize()
                start = time.perf_counter()
            out = run(images)
            torch.autograd.grad(out.float().sum(), parameters, allow_unused=True)
        self._device.synchronize()
        return (time.perf_counter() - start) / TRIALS
