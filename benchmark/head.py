"""The head's step: its four products alone, eager reference, chunked, Triton's kernels, a plain Partial FC.

    python -m benchmark.head [--device cpu] [--classes 1000000] [--batch_size 128] [--embedding_size 512]
    python -m benchmark.head --sweep [--device cuda --baseline FOLDER_OF_ARCFACE_TORCH]

Each case runs in a process of its own: seconds of a step (forward, backward and update of the centers; the best of
--repeats after a warm-up; on a CPU the process's own seconds on all its threads beside the clock's, as a busy machine
moves only the latter), and the peak memory above the state (centers and momentum). --sweep goes over classes and sample
rates instead: a step's time should follow the sampled rows, not the classes; --baseline runs arcface_torch's
PartialFC_V2 and its torch.optim.SGD beside (on cuda). Beside the cases stand the two ceilings, measured first in the
same run: the rates of a large matrix product and of a copy, and each step's share of them by what `head.plan` counts.
A case that needs more memory than there is now is left out, and says so. Every run writes a dated file with hardware
and versions to benchmark/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmark.record import write_record
from head.head import MarginHead
from head.margins import arcface
from head.ops.chunked import chunk_rows
from head.plan import HeadPlan, StorageFormat
from runtime.device import parse_device

# A CPU's memory is given back when it is freed, so that the process's peak is what was in use.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1048576"}

PRODUCTS = "the products alone"
WAYS = {
    PRODUCTS: {},
    "reference": dict(op="reference"),
    "chunked": dict(op="chunked"),
    "triton": dict(op="triton"),
}


def ways_of(kind: str, sweep: bool, baseline) -> list:
    quickest = "triton" if kind == "cuda" else "chunked"
    if sweep:
        return [quickest, "plain Partial FC", *(["arcface_torch"] if baseline else [])]
    return [way for way in WAYS if kind == "cuda" or not way.startswith("triton")]


class PlainPartialFC(torch.nn.Module):
    """Partial FC as projects write it: a dense parameter that is indexed, autograd, and a dense optimizer."""

    def __init__(self, classes, dim, sample_rate, momentum, device):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(classes, dim, device=device).mul_(0.01))
        self.sampled = int(classes * sample_rate)
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1, momentum=momentum, weight_decay=5e-4)

    def forward(self, emb_BD, label_B):
        weight_RD = self.weight
        if self.sampled < self.weight.shape[0]:
            order_C = torch.rand(self.weight.shape[0], device=emb_BD.device)
            order_C[label_B] = 2.0
            index_R = torch.sort(torch.topk(order_C, self.sampled)[1])[0]
            label_B = torch.searchsorted(index_R, label_B)
            weight_RD = self.weight[index_R]
        cos_BR = F.linear(F.normalize(emb_BD), F.normalize(weight_RD)).clamp(-1, 1)
        target_B = cos_BR.gather(1, label_B[:, None])[:, 0]
        value_B, derivative_B = arcface(target_B.detach())
        value_B = value_B + derivative_B * (target_B - target_B.detach())
        return F.cross_entropy(64 * cos_BR.scatter(1, label_B[:, None], value_B[:, None]), label_B)

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def build(case, device):
    """(what makes a step of it, its state's bytes)."""
    classes, dim = case["classes"], case["embedding_size"]
    if case["way"] == "plain Partial FC":
        head = PlainPartialFC(classes, dim, case["sample_rate"], case["momentum"], device.torch)

        def step(emb_BD, label_B):
            loss = head(emb_BD, label_B)
            loss.backward()
            head.step()
            return loss

        return step, classes * dim * (8 if case["momentum"] else 4)
    if case["way"] == PRODUCTS:
        return build_products(case, device), 4 * classes * dim
    if case["way"] == "arcface_torch":
        return build_baseline(case, device), classes * dim * (8 if case["momentum"] else 4)
    head = MarginHead(
        classes,
        dim,
        sample_rate=case["sample_rate"],
        momentum=case["momentum"],
        device=device.torch,
        dtype=getattr(torch, case["dtype"]),
        momentum_dtype=getattr(torch, case["momentum_dtype"]),
        momentum_on_host=case["momentum_on_host"],
        operand=getattr(torch, case["operand"]),
        **WAYS[case["way"]],
    )

    def step(emb_BD, label_B):
        for _ in range(case["accumulate"]):
            loss = head(emb_BD, label_B).loss
            (loss / case["accumulate"]).backward()
        head.step(0.1)
        return loss

    return step, plan_of(case, device).device_state


def build_products(case, device):
    """What no implementation can do without: two products forward, two for the update, over chunks of rows."""
    dtype = torch.float32 if device.kind == "cpu" else torch.bfloat16
    dim = case["embedding_size"]
    table_CD = torch.randn(case["classes"], dim, device=device.torch).to(dtype)
    sampled = int(case["classes"] * case["sample_rate"])

    def step(emb_BD, label_B):
        left_BD = emb_BD.detach().to(dtype)
        for images in [left_BD] * case["accumulate"] + [left_BD.repeat(case["accumulate"], 1)]:
            chunk = chunk_rows(*images.shape, device.kind, sampled)
            flat, out_BD, out_KD = images.new_empty(len(images) * chunk), images.clone(), images.new_empty(chunk, dim)
            for start in range(0, sampled, chunk):
                rows_KD = table_CD[start : min(start + chunk, sampled)]
                z_BK = flat[: len(images) * len(rows_KD)].view(len(images), -1)
                torch.mm(images, rows_KD.t(), out=z_BK)
                if images is left_BD:
                    torch.mm(z_BK, rows_KD, out=out_BD)
                else:
                    torch.mm(z_BK.t(), images, out=out_KD[: len(rows_KD)])
        return left_BD.sum()

    return step


def build_baseline(case, device):
    from benchmark.step import baseline_modules

    _, losses, partial_fc = baseline_modules(Path(case["baseline"]), device, True)
    margin = losses.CombinedMarginLoss(64, 1.0, 0.5, 0.0, 0)
    head = partial_fc.PartialFC_V2(margin, case["embedding_size"], case["classes"], case["sample_rate"], True)
    head.train().to(device.torch)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=case["momentum"], weight_decay=5e-4)

    def step(emb_BD, label_B):
        loss = head(emb_BD, label_B.clone())  # it writes to its labels
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def ceilings(device) -> dict:
    """{"matmul": operations a second, "copy": bytes read and written a second}, the best of five."""
    low = device.kind != "cpu"
    size = 8192 if low else 1024
    a, b = (torch.randn(size, size).to(device.torch, torch.bfloat16 if low else torch.float32) for _ in range(2))
    source = torch.zeros((4 << 30 if low else 256 << 20) // 4, device=device.torch)
    target = torch.empty_like(source)

    def best(action):
        taken = []
        for _ in range(6):
            device.synchronize()
            start = time.perf_counter()
            action()
            device.synchronize()
            taken.append(time.perf_counter() - start)
        return min(taken[1:])

    return {
        "matmul": 2 * size**3 / best(lambda: torch.mm(a, b)),
        "copy": 8 * source.numel() / best(lambda: target.copy_(source)),
    }


def plan_of(case, device) -> HeadPlan:
    form = StorageFormat(
        getattr(torch, case["dtype"]),
        getattr(torch, case["momentum_dtype"]) if case["momentum"] else None,
        case["momentum_on_host"],
    )
    return HeadPlan(
        case["classes"],
        case["embedding_size"],
        1,
        case["batch_size"],
        case["sample_rate"],
        form,
        device_type=device.kind,
        accumulate=case["accumulate"],
    )


def needed(case, device) -> int:
    """Bytes that the case takes, about: to leave it out where they are not there."""
    plan = plan_of(case, device)
    if case["way"] == "reference":
        return plan.device_state + 4 * plan.sampled * (5 * case["batch_size"] + 3 * case["embedding_size"])
    if case["way"] in ("plain Partial FC", "arcface_torch"):
        dense = 4 * (3 if case["momentum"] else 2) * case["classes"] * case["embedding_size"]
        return dense + 4 * plan.sampled * (8 * case["batch_size"] + 4 * case["embedding_size"])
    return plan.device_bytes


def measure(case) -> dict:
    """One case, in this process."""
    device = parse_device(case["device"])
    if device.kind != "cpu":  # there set() keeps freed memory for the next step, and peaks could not be told apart
        device.set()
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    generator = torch.Generator().manual_seed(0)
    emb_BD = torch.randn(case["batch_size"], case["embedding_size"], generator=generator).to(device.torch)
    label_B = torch.randint(case["classes"], (case["batch_size"],), generator=generator).to(device.torch)
    # what the libraries keep for themselves
    warm, _ = build({**case, "classes": 4096, "sample_rate": 1.0}, device)
    warm(emb_BD.clone().requires_grad_(), label_B % 4096)
    del warm
    device.reset_peak_memory()
    before = device.memory_allocated()
    step, state = build(case, device)
    seconds, cpu_seconds, losses = [], [], []
    for _ in range(1 + case["repeats"]):
        leaf_BD = emb_BD.clone().requires_grad_()
        device.synchronize()
        clock, cpu = time.perf_counter(), time.process_time()
        loss = step(leaf_BD, label_B)
        device.synchronize()
        seconds.append(time.perf_counter() - clock)
        cpu_seconds.append(time.process_time() - cpu)
        losses.append(float(loss))
    plan, rates = plan_of(case, device), case["ceilings"]
    return {
        "seconds": min(seconds[1:]),
        "matmul_share": plan.operations / rates["matmul"] / min(seconds[1:]),
        "copy_share": plan.device_traffic / rates["copy"] / min(seconds[1:]),
        "cpu_seconds": min(cpu_seconds[1:]),
        "state_bytes": state,
        "bytes_above_state": device.max_memory_allocated() - before - state,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "sampled": plan.sampled,
        "load_average": os.getloadavg()[0],
    }


def run(case) -> dict:
    """One case in a process of its own; {"left_out": why} where it does not fit."""
    device = parse_device(case["device"])
    room, needs = device.free_memory(), needed(case, device)
    if needs + 2 * 10**9 > room:
        return {"left_out": f"needs about {needs / 1e9:.1f} GB, {room / 1e9:.1f} are there"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmark.head", "--one", json.dumps(case)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"left_out": (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def line(case, row) -> str:
    name = f"{case['way']:<24}{case['classes']:>12,}{case['sample_rate']:>7g}"
    if "left_out" in row:
        return f"{name}  left out: {row['left_out']}"
    return (
        f"{name}{row['sampled']:>12,}{row['seconds']:>10.3f}{row['cpu_seconds']:>10.3f}"
        f"{row['state_bytes'] / 1e6:>11,.0f}{row['bytes_above_state'] / 1e6:>12,.0f}"
        f"{row['matmul_share']:>8.2f}{row['copy_share']:>6.2f}"
        f"{row['first_loss']:>10.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--classes", type=float, nargs="+")
    parser.add_argument("--sample_rate", type=float, nargs="+")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--embedding_size", type=int, default=512)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--momentum_dtype", default="float32")
    parser.add_argument("--operand", help="of the products, as a policy says; float32 on a CPU, else bfloat16")
    parser.add_argument("--momentum_on_host", action="store_true")
    parser.add_argument("--baseline", help="a folder with arcface_torch, whose Partial FC is run beside (cuda only)")
    parser.add_argument("--accumulate", type=int, default=1, help="forward passes an update")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="instead of all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; 0 = as torch chooses")
    parser.add_argument("--sweep", action="store_true", help="classes 1e5 1e6 1e7, sample rates 1 0.1 0.01")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measure(json.loads(options.one))) + "\n")
        return
    shared = {
        name: getattr(options, name)
        for name in (
            "device",
            "batch_size",
            "embedding_size",
            "momentum",
            "dtype",
            "momentum_dtype",
            "momentum_on_host",
            "baseline",
            "accumulate",
            "repeats",
            "threads",
        )
    }
    device = parse_device(options.device)
    shared["operand"] = options.operand or ("float32" if device.kind == "cpu" else "bfloat16")
    shared["ceilings"] = ceilings(device)
    classes = options.classes or ([1e5, 1e6, 1e7] if options.sweep else [1e6])
    rates = options.sample_rate or ([1.0, 0.1, 0.01] if options.sweep else [1.0])
    ways = options.ways or ways_of(device.kind, options.sweep, options.baseline)
    sys.stdout.write(
        f"{'way':<24}{'classes':>12}{'rate':>7}{'sampled':>12}{'seconds':>10}{'cpu s':>10}{'state MB':>11}"
        f"{'above it MB':>12}{'matmul':>8}{'copy':>6}{'loss':>10}\n"
    )
    rows = []
    for count in classes:
        for rate in rates:
            for way in ways:
                case = {"way": way, "classes": int(count), "sample_rate": rate, **shared}
                row = run(case)
                rows.append({**case, **row})
                sys.stdout.write(line(case, row) + "\n")
                sys.stdout.flush()
                name = f"head_{'sweep_' if options.sweep else ''}{device.kind}"
                content = {"ceilings": shared["ceilings"], "rows": rows}
                path = write_record(name, content, device, options.output)  # as it goes: the machine may go away
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
