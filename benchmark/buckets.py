"""How the ranks exchange the backbone's gradients: DistributedDataParallel's buckets beside the plain exchange.

    torchrun --nproc-per-node=2 -m benchmark.buckets [--device cpu] [--net mobilefacenet] [--batch_size 16] [--rounds 7]

A step is forward, backward with the exchange, and SGD. The plain form sends every gradient by itself once backward is
over; the others send buckets of that many MiB beside backward; "default" is what training takes
(`runtime.dist.wrap_data_parallel`). "static" is the compiled backbone inside DistributedDataParallel, as --static
trains: torch cuts its graph where a bucket ends, so that the exchange runs beside backward; "static, one graph" is not
cut, and needs a run of its own. The forms take turns, so that whatever else the machine does meets all of them; figures
are medians over the rounds on rank 0, and every form's losses have to be the same. gradient_MiB is what the gradients
and their buckets hold; buckets_at is when each bucket's exchange began in one more step, as a share of backward's time.
Writes a dated file with hardware and versions to benchmark/results/.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmark.record import write_record
from model import create_model
from optim import make_sgd, parameter_groups
from runtime import log
from runtime.device import parse_device
from runtime.dist import open_world, world_env, wrap_data_parallel
from runtime.errors import ConfigError, DeviceError

ONE_GRAPH = "static, one graph"
FORMS = {
    "plain": None,
    "default": {},
    "25 MiB, gradients copied": dict(gradient_as_bucket_view=False),
    "1 MiB": dict(bucket_cap_mb=1),
    "4 MiB": dict(bucket_cap_mb=4),
    "one bucket": dict(bucket_cap_mb=10_000),
    "static": dict(static=True),
    ONE_GRAPH: dict(static=True, cut=False),
}


class Form:
    """One copy of the net with its exchange and optimizer."""

    def __init__(self, net, net_mode, options, device, world):
        self.net, self.world, self.plain = copy.deepcopy(net), world, options is None
        options = dict(options or {})
        static, self.cut, self.buckets_at = options.pop("static", False), options.pop("cut", True), []
        inner = device.compiled(self.net) if static else self.net
        self.wrapped = self.net if self.plain else wrap_data_parallel(inner, world, **options)
        self.optimizer = make_sgd(parameter_groups(self.net, net_mode, 5e-4), 1e-4, 0.9, device)

    def step(self, x_BCHW, goal_BD) -> torch.Tensor:
        self.optimizer.zero_grad()
        with nullcontext() if self.cut else torch._dynamo.config.patch(optimize_ddp=False):
            loss = (self.wrapped(x_BCHW) * goal_BD).sum()
        begun = time.perf_counter()
        loss.backward()
        self.buckets_at = [round((at - begun) / (time.perf_counter() - begun), 3) for at in self.buckets_at]
        if self.plain:
            for parameter in self.net.parameters():
                self.world.all_reduce_(parameter.grad).div_(self.world.size)
        self.optimizer.step()
        return loss.detach()

    def watch(self) -> None:
        """From here on buckets_at is known after a step."""

        def hook(_, bucket):
            self.buckets_at.append(time.perf_counter())
            return allreduce_hook(None, bucket)

        self.wrapped.register_comm_hook(None, hook)

    def gradient_bytes(self) -> int:
        """Gradients, and the buckets that are not the same memory."""
        grads = sum(p.grad.numel() * p.grad.element_size() for p in self.net.parameters())
        return grads if self.plain or self.wrapped.gradient_as_bucket_view else 2 * grads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--net", default="mobilefacenet")
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=16, help="images of one rank")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--forms", nargs="+", choices=list(FORMS), default=[name for name in FORMS if name != ONE_GRAPH]
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if {ONE_GRAPH, "static"} <= set(options.forms):
        raise ConfigError(f"--forms static '{ONE_GRAPH}': in runs of their own: torch would take one's graph for both")
    device = parse_device(options.device, world_env()["local_rank"])
    device.set()
    with open_world(device) as world:
        if world.size == 1:
            raise DeviceError("one rank exchanges nothing: start this with torchrun --nproc-per-node=2")
        rows = measure(options, device, world)
        if world.is_main:
            content = {
                "backend": device.backend,
                "ranks": world.size,
                "net": options.net,
                "rounds": options.rounds,
                "batch_size_of_a_rank": options.batch_size,
                "rows": rows,
            }
            name = f"buckets_{device.kind}_torch-{torch.__version__.split('+')[0]}"
            write_record(name, content, device, options.output)


def measure(options, device, world) -> list:
    device.seed(0)
    net = create_model(options.net, options.depth, 512, dropout=0.0).train()
    net.to(device=device.torch, memory_format=device.memory_format)
    forms = {name: Form(net, options.net, FORMS[name], device, world) for name in options.forms}
    device.seed(1 + world.rank)
    x_BCHW = torch.randn(options.batch_size, 3, 112, 112, device=device.torch)
    x_BCHW = x_BCHW.contiguous(memory_format=device.memory_format)
    goal_BD = torch.randn(options.batch_size, 512, device=device.torch)
    taken, losses = {name: [] for name in forms}, {name: [] for name in forms}
    for _ in range(2 + options.rounds):
        for name, form in forms.items():
            world.barrier()
            device.synchronize()
            start = time.perf_counter()
            loss = form.step(x_BCHW, goal_BD)
            device.synchronize()
            taken[name].append(time.perf_counter() - start)
            losses[name].append(float(loss))
    first = options.forms[0]
    for name in forms:
        if max(abs(a - b) for a, b in zip(losses[name], losses[first])) > 1e-3 * abs(losses[first][0]):
            raise SystemExit(f"{name}: losses {losses[name]}, those of {first} {losses[first]}")
    rows = []
    for name, form in forms.items():
        speedup = statistics.median(p / t for p, t in zip(taken[first][2:], taken[name][2:]))
        if not form.plain:
            form.watch()
            form.step(x_BCHW, goal_BD)
        rows.append(
            {
                "form": name,
                "step_s": round(statistics.median(taken[name][2:]), 4),
                "speedup": round(speedup, 3),
                "gradient_MiB": round(form.gradient_bytes() / 2**20, 1),
                "buckets_at": form.buckets_at,
            }
        )
        if world.is_main:
            sys.stdout.write(
                f"{name:<26}{rows[-1]['step_s']:>9.4f} s{rows[-1]['speedup']:>8.3f}x"
                f"{rows[-1]['gradient_MiB']:>8.1f} MiB  {form.buckets_at}\n"
            )
    return rows


if __name__ == "__main__":
    log.run_command(main)
