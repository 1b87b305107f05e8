"""What a step of the sharded head costs from 1 to 1,024 devices and 10^5 to 10^9 classes; and how far that is right.

    python -m benchmark.scaling [--form "bf16 + int8"] [--sample_rate 0.1] [--batch_size 128] [--device_memory 139GiB]
    OMP_NUM_THREADS=1 python -m benchmark.scaling --check

Without --check: arithmetic, from `head.plan`. Bytes of state and step, what is sent, and the step's floor, with the
rates of `head.plan.Rates` and two assumptions that nobody measured here: a stage of a collective waits --latency,
and a collective of n ranks has log2 n stages (an all_reduce twice as many). Every device has --batch_size images, so
the batch grows with the devices. The backbone's own compute is not in it; the exchange of its gradient is.

With --check: 1, 2 and 4 gloo ranks on this machine. The collectives that a step calls, and the bytes in each, are
counted around torch.distributed and have to be those of the formula; the seconds of a step stand beside what the
same formula says with the rates of this machine, measured by all ranks at once before and after. A dated record goes to
benchmark/results/. This is a check of the sums, on one machine over the loopback interface: it says nothing about the
speed of a cluster.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from benchmark.record import write_record
from head.head import MarginHead
from head.ops.chunked import chunk_rows
from head.plan import FORMATS, GIB, Collective, HeadPlan, Rates, parse_size
from runtime.device import parse_device
from runtime.dist import open_world, wrap_data_parallel

BACKBONE_PARAMETERS = 65e6  # ir_se 100, about
DEVICES = (1, 8, 64, 256, 1024)
CLASSES = (10**5, 10**6, 10**7, 10**8, 10**9)


# --- the arithmetic --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """rates: of one device. latency: seconds of a stage of a collective. ring: n - 1 stages instead of log2 n."""

    rates: Rates = Rates()
    latency: float = 10e-6
    ring: bool = False

    def exchange(self, collectives, ranks) -> float:
        """Seconds of these collectives, one after the other."""
        if ranks == 1:
            return 0.0
        stages = ranks - 1 if self.ring else math.ceil(math.log2(ranks))
        return sum(
            collective.sent(ranks) / self.rates.network
            + (2 if collective.kind == "all_reduce" else 1) * stages * self.latency
            for collective in collectives
        )


def backbone_exchange(ranks: int, parameters: float, element_bytes: int) -> tuple:
    """The mean of the backbone's gradient, as one piece (DistributedDataParallel cuts it into buckets of 25 MB)."""
    return (Collective("gradient of the backbone", "all_reduce", int(parameters * element_bytes)),) if ranks > 1 else ()


@dataclass(frozen=True)
class Step:
    """Seconds of a step: head: its products, memory or host link, the slowest. binds: which of them that is.
    head_network, backbone_network: of the collectives."""

    head: float
    binds: str
    head_network: float
    backbone_network: float


def simulate(plan: HeadPlan, machine: Machine, parameters: float = BACKBONE_PARAMETERS, element_bytes: int = 2) -> Step:
    """The floor of a step: nothing but what has to be done, at full rate."""
    parts = {
        "products": plan.operations / machine.rates.operations,
        "memory": plan.device_traffic / machine.rates.memory,
        "host link": plan.host_traffic / machine.rates.host_link,
    }
    binds = max(parts, key=parts.get)
    backbone = backbone_exchange(plan.world_size, parameters, element_bytes)
    return Step(
        parts[binds],
        binds,
        machine.exchange(plan.collectives, plan.world_size),
        machine.exchange(backbone, plan.world_size),
    )


def collectives_table(plan: HeadPlan, parameters: float, element_bytes: int) -> str:
    """What travels in a step, as markdown: bytes of each tensor, and what a rank sends."""
    lines = [
        f"| {plan.world_size} devices, {plan.batch} images each | collective | bytes of the tensor | a device sends |",
        "| --- | --- | --- | --- |",
    ]
    for one in (*plan.collectives, *backbone_exchange(plan.world_size, parameters, element_bytes)):
        lines.append(f"| {one.what} | {one.kind} | {one.size:,} | {one.sent(plan.world_size):,.0f} |")
    return "\n".join(lines)


def scaling_table(base: HeadPlan, machine: Machine, memory: float, host: float, parameters, element_bytes) -> str:
    """Classes down, devices across, as markdown: the head's GiB on a device (! where they do not fit), the floor of a
    step in ms and what sets it; below, what does not depend on the classes."""
    plans = [replace(base, world_size=devices) for devices in DEVICES]
    lines = [f"| classes | {' | '.join(f'{devices:,}' for devices in DEVICES)} |", "| --- |" + " --- |" * len(DEVICES)]
    for classes in CLASSES:
        cells = []
        for plan in (replace(plan, classes=classes) for plan in plans):
            fits = plan.device_bytes <= memory and plan.host_state <= host
            step = simulate(plan, machine, parameters, element_bytes)
            cells.append(
                f"{plan.device_bytes / GIB:.2f} GiB{'' if fits else ' !'}, {1e3 * step.head:.2f} ms {step.binds}"
            )
        lines.append(f"| {classes:.0e} | {' | '.join(cells)} |".replace("e+0", "e"))
    steps = [simulate(plan, machine, parameters, element_bytes) for plan in plans]
    for name, values in (
        ("head's collectives, ms", [f"{1e3 * step.head_network:.2f}" for step in steps]),
        ("backbone's gradient, ms", [f"{1e3 * step.backbone_network:.2f}" for step in steps]),
        ("MB a device sends for the head", [f"{plan.network_traffic / 1e6:.1f}" for plan in plans]),
    ):
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def fewest_devices(base: HeadPlan, classes: int, memory: float, host: float, most: int = 2**14):
    """The smallest power of two of devices that holds so many classes; None where `most` do not."""
    devices = 1
    while devices <= most:
        plan = replace(base, classes=classes, world_size=devices)
        if plan.device_bytes <= memory and plan.host_state <= host:
            return devices
        devices *= 2
    return None


def devices_table(base: HeadPlan, memory: float, host: float) -> str:
    """The fewest devices (a power of two) for each form and number of classes, as markdown."""
    lines = [
        f"| centers + momentum | {' | '.join(f'{classes:.0e}' for classes in CLASSES)} |",
        "| --- |" + " --- |" * len(CLASSES),
    ]
    for name, form in FORMATS.items():
        found = [fewest_devices(replace(base, form=form), classes, memory, host) for classes in CLASSES]
        lines.append(f"| {name} | {' | '.join('-' if n is None else str(n) for n in found)} |")
    return "\n".join(lines).replace("e+0", "e")


# --- the check -------------------------------------------------------------------------------------------------------

# torch's names for the collectives that the project uses, old and new
KINDS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "broadcast": "broadcast",
}


@contextmanager
def counted():
    """-> a list that gets (kind, bytes of the whole tensor) of each call to torch.distributed inside."""
    calls, inside = [], []

    def counting(kind, function):
        def call(*args, **kw):
            if not inside:  # a collective may be made of others
                whole = args[1] if kind == "reduce_scatter" else args[0]
                tensors = [whole] if torch.is_tensor(whole) else whole
                calls.append((kind, sum(t.numel() * t.element_size() for t in tensors)))
            inside.append(kind)
            try:
                return function(*args, **kw)
            finally:
                inside.pop()

        return call

    with ExitStack() as stack:
        for name, kind in KINDS.items():
            if hasattr(dist, name):
                stack.enter_context(mock.patch.object(dist, name, counting(kind, getattr(dist, name))))
        yield calls


CASES = {
    "all rows": dict(classes=40_000, batch=32),
    "a tenth sampled, bf16 + int8": dict(classes=200_000, batch=32, sample_rate=0.1, form="bf16 + int8"),
    "large batch, few classes": dict(classes=4_000, batch=128),
}


def plan_of(case: dict, ranks: int) -> HeadPlan:
    """The plan of a case on a CPU. case: classes, batch (of a rank), and what differs from HeadPlan's own values."""
    given = dict(case, form=FORMATS[case.get("form", "fp32 + fp32")])
    return HeadPlan(world_size=ranks, device_type="cpu", operand_bytes=4, **given)


def make_step(world, plan: HeadPlan, net=None, margin="arcface"):
    """-> a function that makes one step of the head (and of a net before it): forward, backward, update."""
    form = plan.form
    head = MarginHead(
        plan.classes,
        plan.embedding_size,
        margin=margin,
        world=world,
        sample_rate=plan.sample_rate,
        dtype=form.dtype,
        momentum_dtype=form.momentum_dtype or torch.float32,
        momentum=0.9 if form.momentum_dtype else 0.0,
        momentum_on_host=form.momentum_on_host,
    )
    generator = torch.Generator().manual_seed(world.rank)
    image_BD = torch.randn(plan.batch, plan.embedding_size, generator=generator)
    label_B = torch.randint(plan.classes, (plan.batch,), generator=generator)

    def step():
        if net is not None:
            for parameter in net.parameters():
                parameter.grad = None
        head.prepare(label_B)
        emb_BD = net(image_BD) if net is not None else image_BD.clone().requires_grad_()
        head(emb_BD, label_B).loss.backward()
        head.step(0.1)

    return step


def count(world, case: dict, margin: str = "arcface") -> list:
    """(kind, bytes) of each collective of the head's second step."""
    step = make_step(world, plan_of(case, world.size), margin=margin)
    step()
    with counted() as calls:
        step()
    return calls


def count_several(world, cases: dict) -> dict:
    """{name: (case, margin)} -> {name: what `count` finds}."""
    return {name: count(world, case, margin) for name, (case, margin) in cases.items()}


def expected(case: dict, ranks: int) -> list:
    """What `count` has to find."""
    return [(collective.kind, collective.size) for collective in plan_of(case, ranks).collectives]


HIDDEN = 4096  # of the net in front of the head: 4.2 million parameters, 16.8 MB of gradient


def make_net(world, dim):
    """A net with much gradient and little arithmetic, whose exchange goes through torch.distributed.all_reduce."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(dim, HIDDEN, bias=False), torch.nn.Linear(HIDDEN, dim, bias=False))
    parallel = wrap_data_parallel(net, world)
    if world.size > 1:
        parallel.register_comm_hook(
            None,
            lambda _, bucket: (
                dist.all_reduce(bucket.buffer().div_(world.size), group=world.group, async_op=True)
                .get_future()
                .then(lambda future: future.value()[0])
            ),
        )
    # input of the first layer needs no gradient: 2 products there, 3 in the second
    return parallel, sum(p.numel() for p in net.parameters()), 2 * dim * HIDDEN * 5


def best_seconds(work, world, rounds, clock=time.perf_counter) -> float:
    """Of the rounds, the best; of the ranks, the slowest."""
    seconds = []
    for _ in range(rounds):
        world.barrier()
        start = clock()
        work()
        seconds.append(clock() - start)
    return min(max(one) for one in zip(*world.all_gather_object(seconds)))


PASSES = 11  # of the passes over a logit, without its products: scaled, compared, shifted, exp, summed, and again


def measure_rates(world, plan: HeadPlan) -> dict:
    """What this machine gives a rank while all ranks work: the chunked pass's products and the rest, memory, gloo."""
    batch, dim = plan.global_batch, plan.embedding_size
    rows = chunk_rows(batch, dim, "cpu", plan.sampled)
    left_BD, right_RD, out_BR = torch.randn(batch, dim), torch.randn(rows, dim), torch.empty(batch, rows)
    sum_BD, grad_RD, scale_R = torch.zeros(batch, dim), torch.empty(rows, dim), torch.ones(rows)

    def products():
        for _ in range(2):
            torch.mm(left_BD, right_RD.t(), out=out_BR)
        sum_BD.addmm_(out_BR, right_RD)
        torch.mm(out_BR.t(), left_BD, out=grad_RD)

    def passes():
        out_BR.mul_(scale_R).amax(1)
        out_BR.sub_(scale_R).exp_().sum(1)

    seconds = best_seconds(products, world, 20)
    out_BR.zero_()
    pass_seconds = best_seconds(passes, world, 20) / 5
    # out of the cache: read and written
    from_N, to_N = torch.ones(16 * 2**20), torch.ones(16 * 2**20)
    copy = best_seconds(lambda: to_N.copy_(from_N), world, 8)
    rates = {
        "operations": 8.0 * batch * dim * rows / seconds,
        "memory": 8.0 * from_N.numel() / copy,
        "passes": batch * rows / pass_seconds,
        "network": math.inf,
        "latency": 0.0,
    }
    if world.size > 1:
        small, large_bytes = torch.zeros(1), 16 * 2**20
        large = torch.zeros(large_bytes // 4)
        latency = best_seconds(lambda: [world.all_reduce_(small) for _ in range(50)], world, 8) / 50
        whole = best_seconds(lambda: world.all_reduce_(large), world, 8)
        rates["latency"] = latency / (2 * (world.size - 1))
        rates["network"] = Collective("", "all_reduce", large_bytes).sent(world.size) / max(whole - latency, 1e-9)
    return rates


def loopback_bytes() -> int:
    """Sent over the loopback interface since the machine started, by whomever."""
    with open("/proc/net/dev") as file:
        return next(int(line.split()[9]) for line in file if line.strip().startswith("lo:"))


def measure(world, case: dict, rounds: int) -> dict:
    """Counts, bytes, rates and seconds of one case with these ranks."""
    torch.set_num_threads(1)
    plan = plan_of(case, world.size)
    net, parameters, operations = make_net(world, plan.embedding_size)
    step = make_step(world, plan, net)
    for _ in range(3):  # DistributedDataParallel arranges its buckets anew after the first
        step()
    with counted() as calls:
        step()
    gradient = [size for kind, size in calls if (kind, size) not in expected(case, world.size)]
    head_calls = [call for call in calls if call in expected(case, world.size)]
    rates = [measure_rates(world, plan)]
    wire = []
    for _ in range(3 if world.size > 1 else 0):
        world.barrier()
        before = loopback_bytes()
        for _ in range(3):
            step()
        world.barrier()
        wire.append((loopback_bytes() - before) / 3)
    seconds = best_seconds(step, world, rounds)
    cpu_seconds = best_seconds(step, world, rounds, time.process_time)
    rates.append(measure_rates(world, plan))
    best = {name: (min if name == "latency" else max)(one[name] for one in rates) for name in rates[0]}
    machine = Machine(Rates(best["operations"], best["memory"], math.inf, best["network"]), best["latency"], ring=True)
    floor = simulate(plan, machine, parameters, 4)
    # one core does one thing after the other: what overlaps on a device at best adds up here
    parts = {
        "net": plan.batch * operations / best["operations"],
        "products": plan.operations / best["operations"],
        "memory": plan.device_traffic / best["memory"],
        "passes": PASSES * plan.global_batch * plan.sampled / best["passes"],
        "head_collectives": floor.head_network,
        "gradient": floor.backbone_network,
    }
    predicted = sum(parts.values())
    sent = plan.network_traffic + sum(c.sent(world.size) for c in backbone_exchange(world.size, parameters, 4))
    return {
        "ranks": world.size,
        "head_calls": head_calls,
        "head_calls_expected": expected(case, world.size),
        "gradient_bytes": sum(gradient),
        "gradient_bytes_expected": 4 * parameters if world.size > 1 else 0,
        "gradient_calls": len(gradient),
        "sent_by_all": sent * world.size,
        "loopback_bytes": min(wire) if wire else 0,
        "rates": {k: v for k, v in best.items() if math.isfinite(v)},
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "predicted": predicted,
        "predicted_parts": parts,
        "sampled": plan.sampled,
        "load_average": os.getloadavg()[0],
    }


def worker(output: str, rounds: int) -> None:
    """What each rank of the check runs: every case."""
    with open_world(parse_device("cpu"), 120) as world:
        found = {name: measure(world, case, rounds) for name, case in CASES.items()}
        if world.is_main:
            Path(output).write_text(json.dumps(found))


def check_table(results: dict) -> str:
    """The check as markdown."""
    lines = [
        "| case | ranks | head's collectives: counted, formula | their bytes: counted, formula | gradient bytes: "
        "counted, formula | loopback bytes / formula | step measured, ms | of it on a core, ms | predicted, ms | "
        "predicted / measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in CASES:
        for ranks, found in results.items():
            one = found[name]
            size = [f"{sum(size for _, size in one[key]):,}" for key in ("head_calls", "head_calls_expected")]
            wire = f"{one['loopback_bytes'] / one['sent_by_all']:.3f}" if one["sent_by_all"] else "-"
            lines.append(
                f"| {name} | {ranks} | {len(one['head_calls'])}, {len(one['head_calls_expected'])} | {'; '.join(size)} "
                f"| {one['gradient_bytes']:,}; {one['gradient_bytes_expected']:,} | {wire} | "
                f"{1e3 * one['seconds']:.1f} | {1e3 * one['cpu_seconds']:.1f} | {1e3 * one['predicted']:.1f} | "
                f"{one['predicted'] / one['seconds']:.2f} |"
            )
    return "\n".join(lines)


def check(options) -> None:
    results = {}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            output = f"{folder}/found.json"
            start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
            done = subprocess.run(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    *start,
                    "-m",
                    "benchmark.scaling",
                    "--worker",
                    output,
                    "--rounds",
                    str(options.rounds),
                ],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=500,
            )
            if done.returncode:
                sys.exit(f"{ranks} ranks ended with status {done.returncode}:\n{done.stderr[-3000:]}")
            results[str(ranks)] = json.loads(Path(output).read_text())
    content = {"threads of a rank": 1, "cases": CASES, "results": results}
    file = write_record("scaling_check_cpu", content, parse_device("cpu"), options.output)
    sys.stdout.write(check_table(results) + f"\n{file}\n")
    wrong = [
        f"{name}, {ranks} ranks"
        for ranks, found in results.items()
        for name, one in found.items()
        if one["head_calls"] != one["head_calls_expected"] or one["gradient_bytes"] != one["gradient_bytes_expected"]
    ]
    if wrong:
        sys.exit(f"the formula is wrong for: {'; '.join(wrong)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="count and measure on gloo ranks of this machine")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of a case; the best counts")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--form", choices=list(FORMATS), default="bf16 + int8")
    parser.add_argument("--embedding_size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=128, help="images of one device")
    parser.add_argument("--sample_rate", type=float, default=0.1)
    parser.add_argument("--device_memory", default="139GiB")
    parser.add_argument("--reserve", default="16GiB", help="of it, for backbone and activations")
    parser.add_argument("--host_memory", default="112GiB", help="of one rank's share of its machine")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds of a stage of a collective, assumed")
    parser.add_argument("--parameters", type=float, default=BACKBONE_PARAMETERS, help="of the backbone")
    parser.add_argument("--gradient_bytes", type=int, default=2, help="of an element of its gradient; O0 and O1: 4")
    for name, value in vars(Rates()).items():
        parser.add_argument(f"--{name}_rate", type=float, default=value, help="a second [%(default)g]")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.rounds)
        return
    if options.check:
        check(options)
        return
    rates = Rates(**{name: getattr(options, f"{name}_rate") for name in vars(Rates())})
    machine = Machine(rates, options.latency)
    memory = parse_size(options.device_memory) - parse_size(options.reserve)
    host = parse_size(options.host_memory)
    base = HeadPlan(
        10**8,
        options.embedding_size,
        1,
        options.batch_size,
        options.sample_rate,
        FORMATS[options.form],
    )
    sys.stdout.write(
        "\n\n".join(
            [
                f"{options.form}, sample rate {options.sample_rate:g}, {options.batch_size} images a device",
                scaling_table(base, machine, memory, host, options.parameters, options.gradient_bytes),
                "The fewest devices:",
                devices_table(base, memory, host),
                collectives_table(replace(base, world_size=8), options.parameters, options.gradient_bytes),
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
