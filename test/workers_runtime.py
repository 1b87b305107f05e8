"""What the ranks do in the tests of runtime/."""

from __future__ import annotations

import os
import time

import torch
from torch import nn

from runtime.dist import wrap_data_parallel
from runtime.shard import RowShard


def collectives(world):
    """Every method of World, on numbers from which the ranks and their order can be told."""
    r, n = world.rank, world.size
    odd = torch.arange(6.0).view(2, 3).t()[:, r % 2 : r % 2 + 1]  # not contiguous
    world.barrier()
    return {
        "sum": world.all_reduce_(torch.tensor([1 << r])).item(),
        "max": world.all_reduce_(torch.tensor([float(r)]), "max").item(),
        "min": world.all_reduce_(torch.tensor([r + 5], dtype=torch.int32), op="min").item(),
        "gathered": world.all_gather(torch.full((2, 3), r, dtype=torch.float64)).tolist(),
        "gathered_0": world.all_gather(torch.empty(0, 3)).shape,
        "gathered_odd": world.all_gather(odd).tolist(),
        "rows": world.gather_rows(torch.full((r, 2), r), range(n)).tolist(),
        "no_rows": world.gather_rows(torch.empty(0, 4), [0] * n).shape,
        "scattered": world.reduce_scatter_rows((r + 1) * torch.arange(2.0 * n).view(2 * n, 1)).tolist(),
        "broadcast": world.broadcast_(torch.tensor([float(r)]), src=n - 1).item(),
        "objects": world.all_gather_object({"rank": r}),
        "place": (world.rank, world.size, world.local_rank, world.local_size, world.is_main),
    }


def wrong_calls(world):
    said = []
    for call in (
        lambda: world.all_reduce_(torch.ones(1), "mean"),
        lambda: world.gather_rows(torch.ones(3, 2), [2, 2]),
        lambda: world.gather_rows(torch.ones(3, 2), [3]),
        lambda: world.reduce_scatter_rows(torch.ones(3, 2)),
    ):
        try:
            call()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x):
        return self.layers(x)


def gradients(world, x_ND):
    """Gradients of the mean over the ranks' equal parts of x, in float64, with batch norm frozen; and its buffers
    after another forward with batch norm in training."""
    torch.manual_seed(1)
    net = Net().double()
    net.layers[1].eval()
    ddp = wrap_data_parallel(net, world)
    part = RowShard.of(len(x_ND), world.rank, world.size)
    ddp(x_ND[part.slice]).square().mean().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.layers[1].train()
    ddp(x_ND[part.slice])
    return grads, net.layers[1].running_mean, type(ddp).__name__


def trouble(world, kind, culprit):
    """All ranks sum; in the third round the culprit goes wrong in the way that `kind` says."""
    pids = world.all_gather_object(os.getpid())
    for step in range(4):
        if step == 2 and world.rank == culprit:
            if kind == "dies":
                os.kill(os.getpid(), 9)
            if kind == "hangs":
                hang_until_alone(pids)
            if kind == "stops":
                raise ValueError("image 7\nis damaged")
        if kind == "hangs" and step == 3:
            world.barrier()
        world.all_reduce_(torch.ones(1000))


def barrier_without_one(world, culprit):
    pids = world.all_gather_object(os.getpid())
    if world.rank == culprit:
        hang_until_alone(pids)
    world.barrier()


def hang_until_alone(pids):
    end = time.monotonic() + 600
    while any(pid != os.getpid() and os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    os._exit(0)


def sleeps(world, seconds):
    time.sleep(seconds)


def diverges(world):
    if world.rank == 0:
        world.all_reduce_(torch.ones(1000))
    else:
        world.barrier()


def exchange_beside_backward(world) -> list:
    """What happens in backward of a compiled net: a part of it is over, or a bucket's exchange begins, in order."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    net = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.PReLU()) for _ in range(6)))
    ddp = wrap_data_parallel(torch.compile(net, backend="aot_eager", dynamic=False), world, bucket_cap_mb=2)
    happened = []

    def hook(_, bucket):
        happened.append("bucket")
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, hook)
    for _ in range(2):  # buckets follow the order of the first backward
        happened.clear()
        output = ddp(torch.ones(2, 512))
        nodes, known = [output.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in known:
                continue
            known.add(node)
            nodes += [before for before, _ in node.next_functions]
            if "Compiled" in node.name():
                node.register_hook(lambda grads, outputs: happened.append("part"))
        output.sum().backward()
    return happened
