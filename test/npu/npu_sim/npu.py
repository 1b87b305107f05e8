"""What becomes torch.npu: the functions of torch_npu 2.x that a portable program needs, under their names.

NPU_SIM_NAME (Ascend910B3) is the device's name, NPU_SIM_BF16=0 a chip without bfloat16 (the 910 before B).
"""

from __future__ import annotations

import copy
import os
import types
import warnings

import torch

from . import amp  # noqa: F401  (torch.npu.amp)

_ops = torch.ops.npu_sim
_initialized = False
_forked = False

set_stream = torch.accelerator.set_stream


def _index(device=None) -> int:
    if device is None:
        return _ops.current_device()
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "npu":
        raise ValueError(f"Expected a npu device, but got: {device}")
    return _ops.current_device() if device.index is None else device.index


# Life of the device: it opens at the first use, and not again in a fork of a process that has used it.


def init() -> None:
    global _initialized
    if _forked:
        raise RuntimeError(
            "Cannot re-initialize NPU in forked subprocess. To use NPU with multiprocessing, you must "
            "use the 'spawn' start method"
        )
    _initialized = True


_lazy_init = init


def _after_fork() -> None:
    global _initialized, _forked
    _initialized, _forked = False, _initialized or _forked


os.register_at_fork(after_in_child=_after_fork)


def is_initialized() -> bool:
    return _initialized


def _is_in_bad_fork() -> bool:
    return _forked


def is_available() -> bool:
    return device_count() > 0


def device_count() -> int:
    return _ops.device_count()


def current_device() -> int:
    init()
    return _ops.current_device()


def set_device(device) -> None:
    init()
    _ops.set_device(_index(device))


def synchronize(device=None) -> None:
    init()
    torch.accelerator.synchronize(_index(device))


class device:
    """Context: another current device."""

    def __init__(self, device):
        self.index = _index(device)

    def __enter__(self):
        self.before = _ops.current_device()
        _ops.set_device(self.index)

    def __exit__(self, *exception):
        _ops.set_device(self.before)


# Streams and events.


class Stream(torch.Stream):
    def __new__(cls, device=None, priority=0, **kw):
        return super().__new__(cls, device=f"npu:{_index(device)}", priority=priority, **kw)


def Event(enable_timing=False, blocking=False, interprocess=False):
    return torch.Event(device="npu", enable_timing=enable_timing)  # its elapsed_time() takes no subclass


def current_stream(device=None):
    return torch.accelerator.current_stream(_index(device))


class stream:
    """Context: another current stream."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        if self.stream is not None:
            self.before = torch.accelerator.current_stream(self.stream.device)
            torch.accelerator.set_stream(self.stream)

    def __exit__(self, *exception):
        if self.stream is not None:
            torch.accelerator.set_stream(self.before)


# Random numbers.


def _generator(device=None):
    return _ops.default_generator(_index(device))


def manual_seed(seed) -> None:
    _generator().manual_seed(int(seed))


def manual_seed_all(seed) -> None:
    for index in range(device_count()):
        _generator(index).manual_seed(int(seed))


def initial_seed() -> int:
    return _generator().initial_seed()


def get_rng_state(device="npu"):
    return _generator(device).get_state()


def set_rng_state(state, device="npu") -> None:
    _generator(device).set_state(state)


# Memory, in bytes.


def memory_allocated(device=None) -> int:
    return _ops.memory(_index(device))


def max_memory_allocated(device=None) -> int:
    return _ops.peak_memory(_index(device))


def reset_peak_memory_stats(device=None) -> None:
    _ops.reset_peak_memory(_index(device))


def mem_get_info(device=None) -> tuple[int, int]:
    return _ops.total_memory() - memory_allocated(device), _ops.total_memory()


def empty_cache() -> None:
    pass


# What the device is and can.


def get_device_name(device=None) -> str:
    return os.environ.get("NPU_SIM_NAME", "Ascend910B3")


def get_device_properties(device=None):
    return types.SimpleNamespace(name=get_device_name(device), total_memory=_ops.total_memory())


def get_amp_supported_dtype() -> list:
    return [torch.float16, torch.bfloat16, torch.float32]


def is_bf16_supported() -> bool:
    return os.environ.get("NPU_SIM_BF16", "1") != "0"


def set_compile_mode(jit_compile=False) -> None:
    pass


# Precision of fp32: of the compiler (910A), of the matrix unit (hf32), and private layouts.

options: dict = {}


def set_option(option: dict) -> None:
    if not isinstance(option, dict):
        raise TypeError("npu option must be a dict.")
    options.update(option)
    if "ACL_PRECISION_MODE" in option:
        _ops.keep_origin_dtype(option["ACL_PRECISION_MODE"] == "must_keep_origin_dtype")


class _Switch:
    """allow_hf32 takes a bool alone; for convolutions it is on until somebody says otherwise."""

    def __init__(self, default: bool):
        self.__dict__["allow_hf32"] = default

    def __setattr__(self, name, value):
        if name != "allow_hf32" or not isinstance(value, bool):
            raise TypeError(f"{name} = {value!r}")
        self.__dict__[name] = value


matmul, conv = _Switch(False), _Switch(True)
config = types.SimpleNamespace(allow_internal_format=get_device_name().startswith("Ascend910A"))


# Overflow on chips without an INF/NAN mode.


def is_support_inf_nan() -> bool:
    return not _ops.saturates()


def clear_npu_overflow_flag() -> None:
    if is_support_inf_nan():
        warnings.warn("clear_npu_overflow_flag is useless here", stacklevel=2)
        return
    _ops.clear_overflow_flag()


def get_npu_overflow_flag() -> bool:
    if is_support_inf_nan():
        raise RuntimeError("Unsupported api when soc_version >= Ascend910B1")
    return _ops.overflow_flag()


utils = types.SimpleNamespace(
    is_support_inf_nan=is_support_inf_nan,
    clear_npu_overflow_flag=clear_npu_overflow_flag,
    get_npu_overflow_flag=get_npu_overflow_flag,
)


# Graphs: one recorded step that is replayed, for inputs of one shape. NPU_SIM_GRAPHS=0: an older torch_npu, without.

replays = 0


def _make_graphed_callables(module, sample_args, num_warmup_iters=3):
    """As the real one, replays on the memory that was recorded, without a word where that is no longer what is meant: a
    parameter whose data moved is read where it was, and gradients are handed out as memory that the next replay writes
    to again. Warming up takes gradients of whatever stood in fresh memory. Here the module runs anew, and an input of
    another shape or type is told."""
    if torch.is_autocast_enabled("npu") and torch.is_autocast_cache_enabled():
        raise RuntimeError(
            "make_graphed_callables does not support the autocast caching. Please set `cache_enabled=False`."
        )
    (sample,) = sample_args
    eager, names, parameters = copy.copy(module), *zip(*module.named_parameters())
    recorded, gradients = [p.detach() for p in parameters], [torch.zeros_like(p) for p in parameters]
    for _ in range(num_warmup_iters):
        out = eager(sample)
        torch.autograd.grad(out, parameters, torch.empty_like(out))

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *_):
            ctx.leaves = [p.detach().requires_grad_() for p in recorded]
            with torch.enable_grad():
                ctx.out = torch.func.functional_call(eager, dict(zip(names, ctx.leaves)), (x,))
            return ctx.out.detach()

        @staticmethod
        def backward(ctx, grad):
            for kept, new in zip(gradients, torch.autograd.grad(ctx.out, ctx.leaves, grad)):
                kept.copy_(new)
            return None, *[kept.detach() for kept in gradients]

    def forward(x):
        global replays
        if (x.shape, x.dtype) != (sample.shape, sample.dtype):
            raise RuntimeError("a graph replays inputs of the shape that was recorded")
        replays += 1
        return Replayed.apply(x, *parameters)

    module.forward = forward
    return module


if os.environ.get("NPU_SIM_GRAPHS", "1") != "0":
    make_graphed_callables = _make_graphed_callables
