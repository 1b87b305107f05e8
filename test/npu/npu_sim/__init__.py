"""An emulated Ascend device for tests: after `install()` there are torch.device("npu:0"), torch.npu, Tensor.npu(),
autocast("npu"), checkpoints mapped to "npu:0" and the distributed backend "hccl"; all of it in host memory.

What shows in it: a tensor that was not moved, a hard-coded cuda, memory that nobody filled (fresh memory is NaN), an
operator that an out-of-tree device may lack, a device touched in a forked worker, a float64 matrix product. What does
not: stream races, private formats, the NPU's own rounding and speed.

A process can have one such device and cannot drop it, and it must come before the process's first backward(): run what
uses it in processes of its own. Environment variables: see npu_sim.cpp, and NPU_SIM_NAME, NPU_SIM_BF16 in npu.py.
"""

from __future__ import annotations

import torch

from . import build, no_cuda


def install() -> None:
    """Load the device, once a process. Raises build.Unavailable, one line, where it cannot be built or loaded."""
    if hasattr(torch, "npu"):
        return
    torch.ops.load_library(str(build.library()))
    torch.ops.npu_sim.init()
    torch.utils.rename_privateuse1_backend("npu")
    from . import npu

    torch._register_device_module("npu", npu)
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    if torch.distributed.is_available():
        from . import hccl

        hccl.register()
    no_cuda.forbid()


def operators() -> dict[str, set[str]]:
    """{operator: dtypes of its first npu argument} of what was called since the last forget_operators()."""
    called: dict[str, set[str]] = {}
    for line in torch.ops.npu_sim.calls():
        name, dtype, _ = line.split()
        called.setdefault(name, set()).add(dtype)
    return called


def forget_operators() -> None:
    torch.ops.npu_sim.clear_calls()


_INTEGERS = {"Byte", "Char", "Short", "Int", "Long"}
# Operators that no core of the chip computes before Ascend950, by the types for which that holds: they run on its few
# small ARM cores (AICPU), or, where torch_npu registers none, on the host behind a copy there and back.
_SLOW = {
    **dict.fromkeys(("__rshift__", "__irshift__", "bitwise_right_shift", "bitwise_right_shift_"), _INTEGERS),
    **dict.fromkeys(("sort", "argsort", "topk", "unique", "_unique2", "unique_consecutive", "searchsorted"), _INTEGERS),
    # on the first chips alone
    **dict.fromkeys(("bitwise_and", "bitwise_and_", "bitwise_xor", "bitwise_xor_", "__and__", "__xor__"), {"Long"}),
    **dict.fromkeys(("floor_divide", "floor_divide_"), {"Long"}),
    **dict.fromkeys(("cumsum", "cumsum_"), {"Long", "Bool"}),
    **dict.fromkeys(("index_put_", "_index_put_impl_"), {"Long"}),
    "_fused_sgd_": {"Float", "Half", "BFloat16"},
    "randperm": _INTEGERS,
}


def slow(called: dict[str, set[str]]) -> dict[str, set[str]]:
    """Of operators(), those that run on the AICPU or fall back to the host."""
    found = {name: dtypes & _SLOW.get(name.split("::")[-1], set()) for name, dtypes in called.items()}
    return {name: dtypes for name, dtypes in found.items() if dtypes}
