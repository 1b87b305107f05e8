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
    as does evaluation. Where weights have moved in memory it is recorded anew. Recording runs the module a few times on
    that batch and leaves its buffers and the random numbers as they were. Then both ways are timed, and the slower one
    is dropped.

    device: a runtime.device.Device. record: its make_graphed_callables.
    """

    def __init__(self, module: nn.Module, device, record):
        super().__init__()
        self.module, self._device, self._record = module, device, record
        self._replay, self._recorded = None, None
        self._new_gradients: list[nn.Parameter] = []  # had none before the last replay

    def forward(self, images):
        if not (self.training and torch.is_grad_enabled()):
            return self.module(images)
        # A graph reads the memory that was recorded, and some optimizers move the weights at their first step.
        places = [t.data_ptr() for t in (*self.module.parameters(), *self.module.buffers())]
        if self._recorded is None or self._recorded[0] != places:
            self._choose(images)
            self._recorded, self._new_gradients = (places, images.shape, images.dtype), []
        if self._replay is None or self._recorded[1:] != (images.shape, images.dtype):
            return self.module(images)
        for p in self._new_gradients:  # a parameter without gradient takes the replay's own memory as it
            if p.grad is not None:
                p.grad = p.grad.clone()
        self._new_gradients = [p for p in self.module.parameters() if p.grad is None]
        return self._replay(images)

    def _choose(self, images) -> None:
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # weights are cast within the graph, in every step anew
        try:
            self._record_and_time(images)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _record_and_time(self, images) -> None:
        buffers, random = [buffer.clone() for buffer in self.module.buffers()], self._device.rng_state()
        # record() changes the forward of the module that it is given; the module itself stays eager
        replay = self._record(copy.copy(self.module), (images.clone(),))
        seconds = {name: self._seconds(run, images) for name, run in (("eager", self.module), ("replayed", replay))}
        with torch.no_grad():
            for buffer, before in zip(self.module.buffers(), buffers):
                buffer.copy_(before)
        self._device.set_rng_state(random)
        self._device.clear_overflow()  # recording takes gradients of whatever stands in fresh memory
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
