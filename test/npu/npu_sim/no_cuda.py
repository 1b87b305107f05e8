"""Without a GPU much of torch.cuda does nothing and says nothing. Beside the emulated NPU it fails instead, so that a
call which should have gone to the NPU is found. (Beside a real one it would fail too: torch_npu excludes CUDA.)"""

from __future__ import annotations

import functools
import sys

import torch

# Functions of torch.cuda that are silent, or fail with words that do not say where, on a machine without a GPU.
SILENT = (
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "empty_cache",
    "get_rng_state",
    "get_rng_state_all",
    "ipc_collect",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "reset_peak_memory_stats",
    "seed",
    "seed_all",
    "set_device",
    "set_rng_state",
    "set_rng_state_all",
    "set_stream",
    "stream",
    "synchronize",
)


class CudaCalled(AssertionError):
    """Something on the NPU's path named cuda."""


def forbid() -> None:
    """Make the functions of SILENT, and autocast and GradScaler for cuda, raise CudaCalled, except in torch itself."""
    for name in SILENT:
        setattr(torch.cuda, name, _refusing(f"torch.cuda.{name}", getattr(torch.cuda, name)))
    for owner in (torch.amp.autocast, torch.amp.GradScaler):
        _refuse_cuda_argument(owner)


def _refusing(name, original):
    @functools.wraps(original, updated=())
    def refuse(*args, **kwargs):
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] == "torch":
            return original(*args, **kwargs)  # torch.manual_seed, for one, seeds every kind of device
        raise CudaCalled(f"{name} was called where an NPU is in use")

    return refuse


def _refuse_cuda_argument(owner):
    original = owner.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        device = args[0] if args else kwargs.get("device_type", kwargs.get("device", "cuda"))
        if torch.device(device).type == "cuda":
            raise CudaCalled(f"{type(self).__name__} for cuda was made where an NPU is in use")
        original(self, *args, **kwargs)

    owner.__init__ = init
