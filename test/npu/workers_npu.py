"""What the ranks do in the tests of this folder. Each is handed a world over gloo by test/ranks.py."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from runtime.device import Device, parse_device
from runtime.dist import wrap_data_parallel
from runtime.errors import DeviceError


def over_hccl(world):
    """The same ranks with their tensors on an NPU each and over hccl; objects and barriers stay with gloo."""
    device = parse_device("npu", world.local_rank)
    device.set()
    return device, replace(world, group=dist.new_group(backend="hccl"), device=device.torch)


def collectives(world):
    device, world = over_hccl(world)
    r, n = world.rank, world.size

    def mine(*shape):
        return torch.full(shape, float(r + 1), device=device.torch)

    return {
        "sum": world.all_reduce_(mine(2)).tolist(),
        "max": world.all_reduce_(mine(2), "max").tolist(),
        "all_gather": world.all_gather(mine(1, 2)).tolist(),
        "gather_rows": world.gather_rows(mine(r + 1, 2), range(1, n + 1)).tolist(),
        "reduce_scatter_rows": world.reduce_scatter_rows(torch.arange(2.0 * n, device=device.torch)).tolist(),
        "broadcast": world.broadcast_(mine(2), src=1).tolist(),
        "objects": world.all_gather_object({"rank": r}),
        "device": str(world.all_reduce_(mine(2)).device),
    }


def not_reduced(world):
    device, world = over_hccl(world)
    said = []
    for dtype, reduce in ((torch.float64, world.all_reduce_), (torch.uint8, world.reduce_scatter_rows)):
        try:
            reduce(torch.ones(2, dtype=dtype, device=device.torch))
        except DeviceError as error:
            said.append(str(error))
    return said


def host_tensor(world):
    """What hccl says to a tensor that was left on the host."""
    _, world = over_hccl(world)
    try:
        world.all_reduce_(torch.ones(1))
    except RuntimeError as error:
        return str(error)
    return "taken"


def train(world, kind, steps):
    """Losses and weights of a small net under DistributedDataParallel, on the NPU over hccl or on the CPU over gloo."""
    device = Device("cpu")
    if kind == "npu":
        device, world = over_hccl(world)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.PReLU(8), nn.Flatten(), nn.Linear(8 * 7 * 7, 5)
    ).to(device.torch)
    data_parallel = wrap_data_parallel(net, world)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    generator = torch.Generator().manual_seed(world.rank)
    losses = []
    for _ in range(steps):
        images = torch.randn(4, 3, 16, 16, generator=generator).to(device.torch)
        labels = torch.randint(0, 5, (4,), generator=generator).to(device.torch)
        loss = F.cross_entropy(data_parallel(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(world.all_reduce_(loss.detach().clone()).item())
    return losses, {name: t.cpu() for name, t in net.state_dict().items()}
