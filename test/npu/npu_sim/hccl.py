"""The distributed backend "hccl" for npu tensors: gloo over the host bytes behind them.

As the real one: the collectives over one tensor are not for 3, 5, 6 and 7 ranks, float64 and uint8 are not reduced,
and with NPU_SIM_HCCL_SILENT=1 the host hears nothing of a broken connection: the collective does not return until
torch's watchdog ends the process at the group's timeout.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroupGloo, _create_work_from_future

# Method names differ by version: torch 2.15 calls *_single, older ones the C++ names.
_METHODS = {
    "allreduce": (),
    "allreduce_coalesced": (),
    "broadcast": (),
    "reduce": (),
    "allgather": (),
    "gather": (),
    "scatter": (),
    "reduce_scatter": (),
    "alltoall": ("all_to_all",),
    "send": (),
    "recv": (),
    "allgather_coalesced": (),
    "allgather_into_tensor_coalesced": (),
    "reduce_scatter_tensor_coalesced": (),
    "_allgather_base": ("all_gather_single",),
    "_reduce_scatter_base": ("reduce_scatter_single",),
    "alltoall_base": ("all_to_all_single",),
}


def register() -> None:
    group_class = _group_class()

    def create(options, backend_options=None):
        gloo = ProcessGroupGloo(options.store, options.group_rank, options.group_size, timeout=options.timeout)
        return group_class(gloo, options.group_rank, options.group_size, options.timeout)

    dist.Backend.register_backend("hccl", create, extended_api=True, devices=["npu"])
    dist.is_hccl_available = lambda: True


def _group_class():
    # From torch 2.15 a backend may be written in Python. Before, only a whole process group may.
    base = torch._C._distributed_c10d.Backend
    try:
        type("_Probe", (base,), {"__init__": lambda self: base.__init__(self, 0, 1)})()
    except TypeError:
        base = dist.ProcessGroup

    def init(self, gloo, rank, size, timeout):
        base.__init__(self, rank, size)
        self._gloo, self._size, self._timeout = gloo, size, timeout.total_seconds()

    def barrier(self, opts=None):  # torch calls it with this keyword
        return _finished(self._gloo.barrier(*([] if opts is None else [opts])), [])

    members = {"__init__": init, "barrier": barrier, "getBackendName": lambda self: "hccl", "name": lambda self: "hccl"}
    for name, others in _METHODS.items():
        for spelling in (name, *others):
            members[spelling] = _over_gloo((name, *others))
    if base is dist.ProcessGroup:
        members["getRank"] = lambda self: self._gloo.rank()
        members["getSize"] = lambda self: self._gloo.size()
        members["_device_types"] = property(lambda self: [torch.device("npu")])
    return type("ProcessGroupHCCL", (base,), members)


_REDUCED = (torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16, torch.bool)


def _over_gloo(spellings):
    def call(self, *args):
        name = spellings[0]
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if name in ("_allgather_base", "_reduce_scatter_base") and self._size in (3, 5, 6, 7):
            raise RuntimeError(f"hccl: {name} is not for {self._size} ranks")
        if "reduce" in name and first.dtype not in _REDUCED:
            raise RuntimeError(f"Unsupported data type for HCCL process group: {first.dtype}")
        if name == "reduce_scatter":  # older gloos have none
            return _reduce_scatter(self, *args)
        method = next(getattr(self._gloo, spelling) for spelling in spellings if hasattr(self._gloo, spelling))
        with _silently(self._timeout):
            work = method(*[_on_host(a) if _holds_tensors(a) else a for a in args])
            return _finished(work, list(args[0]) if isinstance(args[0], (list, tuple)) else [args[0]])

    return call


def _reduce_scatter(self, outputs, inputs, *options):
    summed = torch.stack(inputs[0])
    self.allreduce([summed])
    outputs[0].copy_(summed[self.rank()])
    future = torch.futures.Future()
    future.set_result(list(outputs))
    return _create_work_from_future(future)


@contextmanager
def _silently(timeout_s):
    try:
        yield
    except RuntimeError:
        if os.environ.get("NPU_SIM_HCCL_SILENT") != "1":
            raise
        time.sleep(timeout_s)
        print("[ERROR] watchdog: collective operation timeout, process ends", file=sys.stderr, flush=True)
        os._exit(134)


def _finished(work, result):
    # gloo's own future would hand the host's views to DistributedDataParallel: answer with the npu tensors.
    work.wait()
    future = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)


def _holds_tensors(a) -> bool:
    return isinstance(a, torch.Tensor) or (isinstance(a, (list, tuple)) and len(a) > 0 and _holds_tensors(a[0]))


def _on_host(a):
    """npu tensors, also nested -> CPU tensors over the same bytes. HCCL refuses others, and so does this."""
    if not isinstance(a, torch.Tensor):
        return [_on_host(item) for item in a]
    if a.device.type != "npu":
        raise RuntimeError(f"No backend type associated with device type {a.device.type} (hccl takes npu tensors)")
    return torch.ops.npu_sim.cpu_view(a)
