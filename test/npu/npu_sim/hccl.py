"""The distributed backend "hccl" for npu tensors: gloo over the host bytes behind them."""

from __future__ import annotations

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
        return group_class(gloo, options.group_rank, options.group_size)

    dist.Backend.register_backend("hccl", create, extended_api=True, devices=["npu"])
    dist.is_hccl_available = lambda: True


def _group_class():
    # From torch 2.15 a backend may be written in Python. Before, only a whole process group may.
    base = torch._C._distributed_c10d.Backend
    try:
        type("_Probe", (base,), {"__init__": lambda self: base.__init__(self, 0, 1)})()
    except TypeError:
        base = dist.ProcessGroup

    def init(self, gloo, rank, size):
        base.__init__(self, rank, size)
        self._gloo = gloo

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


def _over_gloo(spellings):
    def call(self, *args):
        method = next(getattr(self._gloo, name) for name in spellings if hasattr(self._gloo, name))
        work = method(*[_on_host(a) if _holds_tensors(a) else a for a in args])
        return _finished(work, list(args[0]) if isinstance(args[0], (list, tuple)) else [args[0]])

    return call


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
