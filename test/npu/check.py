"""The first ten minutes on a new Ascend machine: what the project relies on, checked on the device itself.

    bash test/npu_check.sh [--quick] [--output=FOLDER]

Prints a line for each check and leaves npu_check.html and npu_check.json in --output: what to attach to a bug report.
Ends with status 1 where a check failed. --quick: narrow nets and few steps, for a first look and for the tests.
"""

from __future__ import annotations

import argparse
import csv
import html
import io
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(HERE), str(ROOT / "test")]

from runtime import ascend, files  # noqa: E402
from runtime.errors import DeviceError, UserError  # noqa: E402
from runtime.log import one_line, run_command  # noqa: E402

SECTIONS = ("versions", "limits", "operators", "slow operators", "training", "speed", "collectives")
OK, DIFFERS, FAILED, SKIPPED = "ok", "differs", "failed", "not checked"


class Report:
    """Lines of (section, check, status, detail), printed as they come."""

    def __init__(self):
        self.rows: list[dict] = []

    def add(self, section: str, check: str, status: str, detail: str = "") -> None:
        self.rows.append({"section": section, "check": check, "status": status, "detail": detail})
        if status != OK or section != "operators":  # there are many of those
            print(f"{status:12} {section}: {check}{'  ' + detail if detail else ''}", flush=True)

    def section(self, name: str, run: Callable, *arguments) -> None:
        """One section; what it raises is its result, and the others go on."""
        try:
            run(self, *arguments)
        except Exception as error:
            self.add(name, "the check itself", FAILED, f"{type(error).__name__}: {one_line(error)}")

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "npu_check.json", self.rows)
        cells = "".join(
            f'<tr class="{row["status"].split()[0]}">'
            + "".join(
                f"<td>{html.escape(str(row[column]))}</td>" for column in ("section", "check", "status", "detail")
            )
            + "</tr>\n"
            for row in self.rows
        )
        page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>NPU check</title><style>
body {{ font: 14px sans-serif; margin: 2em }} table {{ border-collapse: collapse }}
td, th {{ border-bottom: 1px solid #ddd; padding: 2px 10px; text-align: left; vertical-align: top }}
.failed td {{ background: #fdd }} .differs td {{ background: #ffd }} .not td {{ color: #777 }}
</style></head><body><h1>NPU check</h1><p>{html.escape(self.summary())}</p>
<table><tr><th>section</th><th>check</th><th>result</th><th>detail</th></tr>
{cells}</table></body></html>
"""
        files.write_text(folder / "npu_check.html", page)

    def count(self, status: str) -> int:
        return sum(row["status"] == status for row in self.rows)

    def summary(self) -> str:
        return ", ".join(f"{self.count(status)} {status}" for status in (OK, DIFFERS, FAILED, SKIPPED))


# --- versions --------------------------------------------------------------------------------------------------------


def versions(report: Report, device) -> None:
    import numpy
    import torch

    facts = device.describe()
    for name in ("name", "count", "memory", "machine", "torch", "torch_npu", "cann"):
        report.add("versions", name, OK, str(facts.get(name)))
    standing = ascend.standing(
        torch.__version__, facts["torch_npu"], facts["cann"], platform.python_version(), numpy.__version__
    )
    report.add("versions", "go together", OK if standing.endswith("go with it") else DIFFERS, standing)
    report.add("versions", "fp32 and layouts", OK, str(device.tune()))
    for name in sorted(os.environ):
        if name.startswith(("ASCEND_", "HCCL_", "ACL_", "TASK_QUEUE", "CPU_AFFINITY", "INF_NAN", "PYTORCH_NPU")):
            report.add("versions", name, OK, os.environ[name])
    try:
        done = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, timeout=30)
        report.add("versions", "npu-smi info", OK if done.returncode == 0 else DIFFERS, done.stdout + done.stderr)
    except (OSError, subprocess.SubprocessError) as error:
        report.add("versions", "npu-smi info", SKIPPED, one_line(error))


# --- operators -------------------------------------------------------------------------------------------------------

# Random numbers, memory that nobody filled, and what moves or looks at memory without computing.
NOT_COMPARED = ("rand", "bernoulli", "dropout", "empty", "set_", "_to_copy", "_local_scalar", "resize", "record_stream")


def operators(report: Report, device, steps: int) -> None:
    """Each call of a few training steps, beside the same call on the CPU in float64; and in the same type, because an
    operator may be no more exact than its type allows."""
    import torch
    from small_training import SmallTraining

    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:
        report.add("operators", "each beside float64", SKIPPED, f"needs torch 2.0, and this is {torch.__version__}")
        return
    found: dict[tuple, list] = {}

    def on_cpu(tree, dtype=None):
        def convert(x):
            if isinstance(x, torch.device):
                return torch.device("cpu")
            if x is torch.float16 or x is torch.bfloat16 or x is torch.float32:
                return dtype or x
            if not isinstance(x, torch.Tensor):
                return x
            x = x.detach().cpu().clone()
            return x.to(dtype) if dtype and x.is_floating_point() else x

        return torch.utils._pytree.tree_map(convert, tree)

    def outputs(result):
        tensors = result if isinstance(result, (tuple, list)) else [result]
        return [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]

    def error(result, exact):
        worst = 0.0
        for t, e in zip(outputs(result), outputs(exact)):
            e = e.double().cpu()
            difference = (t.detach().double().cpu() - e).abs().nan_to_num(0.0).max()
            worst = max(worst, float(difference / e.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=1e-30)))
        return worst

    class Compare(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            name = func.overloadpacket.__name__
            if any(word in name for word in NOT_COMPARED) or func.is_view:
                return func(*args, **kwargs)
            exact_args, same_args = on_cpu((args, kwargs), torch.float64), on_cpu((args, kwargs))
            result = func(*args, **kwargs)
            first = next(iter(outputs(result)), None)
            if first is None:
                return result
            try:
                exact = func(*exact_args[0], **exact_args[1])
                same = error(func(*same_args[0], **same_args[1]), exact)
            except (RuntimeError, TypeError, NotImplementedError):
                return result  # an operator of the device's own
            entry = found.setdefault((name, str(first.dtype).replace("torch.", "")), [0, 0.0, 0.0])
            entry[0] += 1
            mine = error(result, exact)
            if mine >= entry[1]:
                entry[1:] = mine, same
            return result

    for policy in ("O0", "O2"):
        training = SmallTraining(device, policy, dropout=0.0)
        with Compare():
            training.run(steps)
    if not found:
        raise DeviceError("no operator was seen")
    for (name, dtype), (calls, mine, same) in sorted(found.items()):
        allowed = 8 * same + 16 * torch.finfo(getattr(torch, dtype)).eps
        report.add(
            "operators", f"{name} {dtype}", OK if mine <= allowed else DIFFERS,
            f"{calls} calls, largest relative error {mine:.1e}, the CPU's in that type {same:.1e}",
        )  # fmt: skip


@contextmanager
def fallbacks_noted() -> Iterator[list[str]]:
    """While open, what torch_npu says of operators that fall back to the host. It says so once a process for each, so
    this has to be open before anything runs."""
    fallen, show = [], warnings.showwarning

    def note(message, *rest, **named):
        said = one_line(str(message))
        if not ("fall" in said and "CPU" in said):
            show(message, *rest, **named)
        elif "_fused_sgd_" not in said:  # tried out to know that, and not what `auto` takes
            fallen.append(said)

    warnings.showwarning = note
    try:
        yield fallen
    finally:
        warnings.showwarning = show


def slow_operators(report: Report, device, output: Path, fallen: list[str]) -> None:
    """What the profiler saw on the AICPU in a training step with sampled classes, and what fell back to the host since
    the first section."""
    from small_training import SmallTraining

    profiler = getattr(sys.modules["torch_npu"], "profiler", None)
    training = SmallTraining(device, "O2", sample_rate=0.5).run(1)
    if profiler is None:
        training.run(1)
        report.add("slow operators", "on the AICPU", SKIPPED, "this torch_npu has no profiler")
    else:
        with tempfile.TemporaryDirectory(dir=output) as folder, redirect_stdout(io.StringIO()):
            activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
            handler = profiler.tensorboard_trace_handler(folder)
            with profiler.profile(activities=activities, on_trace_ready=handler):
                training.run(1)
                device.synchronize()
            tables = list(Path(folder).rglob("kernel_details.csv"))
            if not tables:
                raise DeviceError("the profiler left no kernel_details.csv")
            with open(tables[0], newline="", encoding="utf-8") as file:
                kernels = list(csv.DictReader(file))
        column = next(name for name in ("Accelerator Core", "Task Type") if name in kernels[0])
        on_aicpu = sorted({k.get("Type") or k["Name"] for k in kernels if "AI_CPU" in k[column].upper()})
        detail = ", ".join(on_aicpu) or f"none of {len(kernels)} kernels"
        report.add("slow operators", "on the AICPU", DIFFERS if on_aicpu else OK, detail)
    fallen = sorted(set(fallen))
    report.add("slow operators", "on the host", DIFFERS if fallen else OK, "; ".join(fallen) or "none")


# --- numbers at their limits -----------------------------------------------------------------------------------------


def limits(report: Report, device) -> None:
    """Infinity, overflow and the wrap-around of integers, and whether the chip behaves as torch_npu says."""
    import torch

    place = device.torch
    largest = torch.full((1,), 60000.0, dtype=torch.float16, device=place)
    doubled = float((largest * 2).float().cpu())
    saturates = doubled == 65504.0
    if doubled not in (65504.0, float("inf")):
        report.add("limits", "fp16 overflow", FAILED, f"60000 * 2 gave {doubled}")
    else:
        agrees = saturates == device.saturates
        report.add("limits", "fp16 overflow", OK if agrees else FAILED,
                   f"60000 * 2 gave {doubled}; torch_npu says that the chip saturates: {device.saturates}")  # fmt: skip
    zero = torch.zeros(1, device=place)
    wanted = {
        "exp of the smallest number": (torch.full_like(zero, torch.finfo(torch.float32).min).exp(), 0.0),
        "largest of the smallest": (torch.full((4,), torch.finfo(torch.float32).min, device=place).amax(), None),
        "clamped division": (1 / zero.clamp(min=1e-12), None),
    }
    for name, (value, exact) in wanted.items():
        number = float(value)
        good = number == exact if exact is not None else abs(number) < float("inf")
        report.add("limits", name, OK if good else FAILED, f"{number:g}")
    minus = float(torch.full_like(zero, -float("inf")).exp())
    report.add("limits", "exp of -inf", OK if minus == 0 else FAILED, f"{minus:g}")
    for name, value in (("1 / 0", 1 / zero), ("log 0", zero.log()), ("0 / 0", zero / zero)):
        number = float(value)
        finite = abs(number) < float("inf")
        good = finite == device.saturates
        report.add("limits", name, OK if good else DIFFERS, f"{number:g}")
    device.clear_overflow()
    grad, found, inverse = (torch.full(shape, x, device=place) for shape, x in (((2,), 8.0), ((), 0.0), ((), 0.5)))
    bad = grad.half() * 60000  # inf, or the flag
    torch._amp_foreach_non_finite_check_and_unscale_([bad.float()], found, inverse)
    report.add("limits", "an overflow is found", OK if float(found) >= 1 else FAILED, f"found_inf {float(found):g}")
    device.clear_overflow()
    found.zero_()
    torch._amp_foreach_non_finite_check_and_unscale_([grad], found, inverse)
    good = float(found) == 0 and grad.tolist() == [4.0, 4.0]
    report.add("limits", "none is found where there is none", OK if good else FAILED, f"found_inf {float(found):g}")
    numbers = torch.arange(1, 65, dtype=torch.int32) * 40503077
    for name, run in (("int32 product", lambda x: x * x), ("int32 sum", lambda x: x + x)):
        same = torch.equal(run(numbers.to(place)).cpu(), run(numbers))
        report.add("limits", f"{name} wraps around", OK if same else DIFFERS, "64 numbers beside the CPU's")


# --- collectives -----------------------------------------------------------------------------------------------------

RANK = """
import os, sys
sys.path[:0] = {path!r}
import torch
from runtime.device import parse_device
from runtime.dist import open_world
from runtime.log import run_command

def main():
    device = parse_device("npu", int(os.environ["LOCAL_RANK"]))
    device.set()
    with open_world(device, timeout_s=240) as world:
        r, n = world.rank, world.size
        for dtype in (torch.float32, torch.float16, torch.int32, torch.int64):
            mine = torch.full((3,), r + 1, dtype=dtype, device=device.torch)
            checks = {{
                "all_reduce sum": (world.all_reduce_(mine.clone()), [n * (n + 1) // 2] * 3),
                "all_reduce max": (world.all_reduce_(mine.clone(), "max"), [n] * 3),
                "all_gather": (world.all_gather(mine), [k + 1 for k in range(n) for _ in range(3)]),
                "reduce_scatter": (
                    world.reduce_scatter_rows(torch.arange(2 * n, device=device.torch).to(dtype)),
                    [n * 2 * r, n * (2 * r + 1)],
                ),
                "broadcast": (world.broadcast_(mine.clone(), 0), [1] * 3),
            }}
            for name, (got, wanted) in checks.items():
                if r == 0:
                    print("CHECK", name.replace(" ", "_"), str(dtype).replace("torch.", ""), got.tolist() == wanted)
                elif got.tolist() != wanted:
                    raise SystemExit(f"{{name}} {{dtype}} on rank {{r}}: {{got.tolist()}} for {{wanted}}")
run_command(main)
"""


def collectives(report: Report, count: int) -> None:
    """The world's collectives over hccl on every device of the machine."""
    if count < 2:
        report.add("collectives", "hccl", SKIPPED, "this process sees one device")
        return
    from ranks import free_port

    code = RANK.format(path=[path for path in sys.path if path])
    common = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    try:
        answers = [rank.communicate(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for line in answers[0][0].splitlines():
        if line.startswith("CHECK "):
            _, name, dtype, good = line.split()
            report.add("collectives", f"{name} {dtype} on {count}", OK if good == "True" else FAILED)
    for number, (rank, (_, said)) in enumerate(zip(ranks, answers)):
        if rank.returncode:
            report.add("collectives", f"rank {number}", FAILED, one_line(said.strip().splitlines()[-1] if said else ""))


# --- training --------------------------------------------------------------------------------------------------------


def training(report: Report, device, steps: int) -> None:
    """Steps of each policy beside the CPU's in fp32, and the vendor's fused SGD beside the plain one."""
    from small_training import SmallTraining

    from runtime.device import Device
    from runtime.precision import POLICIES

    exact = SmallTraining(Device("cpu"), dropout=0.0).run(steps).losses
    taken = {}
    for policy, first, last in (("O0", 1e-4, 0.05), ("O1", 0.05, 0.3), ("O2", 0.05, 0.3)):
        losses = taken[policy] = SmallTraining(device, policy, dropout=0.0).run(steps).losses
        start = abs(losses[0] - exact[0]) / exact[0]
        end = abs(sum(losses[-4:]) - sum(exact[-4:])) / exact[0]
        detail = f"{steps} steps: the first loss differs by {start:.1e} of it, the last four's mean by {end / 4:.1e}"
        good = start < first and end / 4 < last and losses[-1] < losses[0]
        report.add("training", f"{policy} ({POLICIES[policy].meaning})", OK if good else FAILED, detail)
    if device.fused_sgd_class() is None:
        report.add("training", "NpuFusedSGD", SKIPPED, "this torch_npu has none")
        return
    plain = SmallTraining(device, sgd="sgd_plain", dropout=0.0).run(steps).losses
    worst = max(abs(a - b) / exact[0] for a, b in zip(taken["O0"], plain))  # what O0 took is the fused one
    report.add("training", "NpuFusedSGD beside plain SGD", OK if worst < 0.02 else FAILED,
               f"{steps} steps: losses differ by at most {worst:.1e} of the first")  # fmt: skip


def speed(report: Report, device, quick: bool) -> None:
    """Images a second of each fast path; what it compares is this machine with itself."""
    from small_training import SmallTraining

    steps = 1 if quick else 20
    paths = {"O0": {"policy": "O0"}, "O1": {"policy": "O1"}, "O2": {"policy": "O2"}, "bf16": {"policy": "bf16"}}
    kinds = [*sorted(device.fused_optimizers()), "sgd_plain"]
    paths.update({f"O2, {kind}": {"policy": "O2", "sgd": kind} for kind in kinds})
    paths["O2, static"] = {"policy": "O2"}
    for name, options in paths.items():
        try:
            run = SmallTraining(device, wide=not quick, batch=4 if quick else 64, **options)
            if name.endswith("static"):
                run.forward = device.compiled(run.net)
            run.run(1 if quick else 3)
            device.synchronize()
            start = time.perf_counter()
            run.run(steps)
            device.synchronize()
        except UserError as error:
            report.add("speed", name, SKIPPED, one_line(error))
            continue
        report.add("speed", name, OK, f"{steps * run.batch / (time.perf_counter() - start):.1f} images/s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="narrow nets and few steps")
    parser.add_argument("--output", default="work_space/npu_check", help="folder of the report")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="and no others")
    options = parser.parse_args()
    from runtime.device import device_count, parse_device

    device = parse_device("npu", 0)
    device.set()
    device.tune()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    report = Report()
    with fallbacks_noted() as fallen:
        runs = {
            "versions": (versions, device),
            "limits": (limits, device),
            "operators": (operators, device, 1 if options.quick else 3),
            "slow operators": (slow_operators, device, output, fallen),
            "training": (training, device, 20),
            "speed": (speed, device, options.quick),
            "collectives": (collectives, device_count("npu")),
        }
        for name in options.sections:
            report.section(name, *runs[name])
    report.write(output)
    print(f"{report.summary()}: {output / 'npu_check.html'}")
    return 1 if report.count(FAILED) else 0


if __name__ == "__main__":
    run_command(main)
