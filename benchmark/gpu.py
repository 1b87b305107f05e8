"""The parts of benchmark/gpu.sh: commands with a share of the time each, run one after the other.

A part that fails or runs out of time costs only itself: what its benchmark had measured is in its record already. The
record of the whole, benchmark/results/DATE_gpu.json, says of each command its status, seconds and last lines.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark.record import RESULTS, write_record
from head.plan import GIB, HeadPlan, StorageFormat
from runtime.device import parse_device
from runtime.errors import UserError

NETS = ("ir_100", "ir_se_100", "iresnet100", "ir_50", "mobilefacenet")
SHARES = {"numerics": 0.1, "head": 0.3, "step": 0.3, "scale": 0.22, "loader": 0.08}
# classes, rate, what keeps them small: float32 where it fits, and the forms of docs/scaling.md beyond
SCALES = (
    (10**7, 0.1, ("--centers_dtype=fp32", "--momentum_dtype=fp32")),
    (6 * 10**7, 0.02, ("--centers_dtype=bf16", "--momentum_dtype=int8")),
    (10**8, 0.02, ("--centers_dtype=bf16", "--momentum_dtype=none", "--head_lr_factor=10")),
)


def numerics(options) -> list:
    tests = ["test/unit/test_triton.py", "test/unit/test_ops.py"]
    only = ["-k", "sampled or float16"] if options.tiny else []
    return [[sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests, *only]]


def head(options) -> list:
    command = [*module("head", options), *baseline(options)]
    if options.tiny:
        return [[*command, "--classes=3000", "--batch_size=8", "--embedding_size=32", "--repeats=1", "--ways=chunked"]]
    return [
        [*command, "--batch_size=1024", "--classes=2.06e6", "--sweep", "--sample_rate=1"],
        [
            *command,
            "--batch_size=512",
            "--classes=1e8",
            "--sample_rate=0.02",
            "--dtype=bfloat16",
            "--momentum=0",
            "--sweep",
        ],
        [*command, "--batch_size=512", "--sweep"],
    ]


def step(options) -> list:
    command = [*module("step", options), *baseline(options)]
    if options.tiny:
        small = ["--nets=mobilefacenet", "--batches=2", "--head=50", "--fast=default", "--rounds=1", "--steps=1"]
        return [[*command, *small]]
    fast = ["--fast", "default", "default+channels_last", "default+static", "default+channels_last+static"]
    policies = ["--policies", "O2", "bf16", "bf16_master"]
    return [
        [*command, "--nets", net, "--batches", "512", "--head=85742", *policies, *fast, "--rounds=3"] for net in NETS
    ]


def scale(options) -> list:
    """Trains, saves, and goes on from what was saved. What does not fit, on the device or the disk, is left out."""
    found, folder = [], Path(tempfile.mkdtemp(prefix="scale_", dir=options.work))  # it alone is removed again
    for classes, rate, stored in [(3000, 0.1, ("--centers_dtype=bf16",))] if options.tiny else SCALES:
        work = folder / str(classes)
        reason = None if options.tiny else too_large(classes, rate, stored, folder)
        if reason:
            found.append(["echo", f"{classes:,} classes left out: {reason}"])
            continue
        train = [
            sys.executable,
            "train.py",
            f"--device_type={options.device.split(':')[0]}",
            "--data_mode=synthetic",
            f"--num_classes={classes}",
            f"--sample_rate={rate}",
            *stored,
            "--net_mode=mobilefacenet",
            f"--batch_size={4 if options.tiny else 512}",
            "--checkpoint=sharded",
            f"--max_iter={2 if options.tiny else 20}",
            "--with_test=False",
            "--tensorboard=False",
            "--log_every=1",
            "--num_workers=0",
            f"--work_path={work}",
            *(["--embedding_size=16"] if options.tiny else []),
        ]
        found += [[*train, "--epochs=1"], [*train, "--epochs=2", "--resume"], ["rm", "-r", str(work)]]
    return found


def too_large(classes, rate, stored, folder) -> str | None:
    import torch

    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "none": None}
    kinds = [names[option.split("=")[1]] for option in stored[:2]]
    plan = HeadPlan(classes, 512, 1, 512, rate, StorageFormat(*kinds))
    free = shutil.disk_usage(folder).free
    if plan.device_state > free:
        return f"its checkpoint takes {plan.device_state / GIB:.0f} GiB, {free / GIB:.0f} are free in {folder}"
    return None


def loader(options) -> list:
    if options.tiny or not options.data_path:
        return [["echo", "loader left out: name a training set with --data_path"]]
    return [[*module("loader", options, device=False), "--data_path", options.data_path]]


PARTS = {"numerics": numerics, "head": head, "step": step, "scale": scale, "loader": loader}


def module(name, options, device=True) -> list:
    command = [sys.executable, "-W", "ignore", "-m", f"benchmark.{name}", "--output", options.output]
    return [*command, "--device", options.device] if device else command


def baseline(options) -> list:
    return ["--baseline", options.baseline] if options.baseline else []


def run(command, seconds) -> dict:
    """Ends the command and all that it started when its time is over."""
    shown, start = shlex.join(["python" if word == sys.executable else word for word in command]), time.monotonic()
    sys.stdout.write(f"$ {shown}\n")
    sys.stdout.flush()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, status = process.communicate(timeout=max(1, seconds))[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 15)
        try:
            said = process.communicate(timeout=20)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            said = process.communicate()[0]
        status = "out of time"
    lines = said.splitlines()
    sys.stdout.write("\n".join(lines[-15:]) + f"\n-> {status}, {time.monotonic() - start:.0f} s\n\n")
    return {"command": shown, "status": status, "seconds": round(time.monotonic() - start, 1), "said": lines[-40:]}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="bash benchmark/gpu.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together [%(default)g]")
    parser.add_argument("--part", default=",".join(PARTS), help="some of them, joined by commas [%(default)s]")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--baseline", default="", help="folder of arcface_torch; without it ours alone")
    parser.add_argument("--data_path", default="", help="training set for the loader")
    parser.add_argument("--work", default="work_space/gpu", help="folder of the checkpoints of the part scale")
    parser.add_argument("--output", default=str(RESULTS), help="folder of the records")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the commands themselves")
    options = parser.parse_args(argv)
    wanted = options.part.split(",")
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        sys.stderr.write(f"error: --part {unknown[0]}: choose from {', '.join(PARTS)}\n")
        return 1
    try:
        device = parse_device(options.device)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if options.baseline and not Path(options.baseline).is_dir():
        sys.stdout.write(f"{options.baseline}: no such folder, ours alone is measured\n")
        options.baseline = ""
    if importlib.util.find_spec("pytest") is None:
        wanted = [name for name in wanted if name != "numerics"]
    Path(options.work).mkdir(parents=True, exist_ok=True)
    start, total, ran, shares = time.monotonic(), 60 * options.minutes, {}, sum(SHARES[name] for name in wanted)
    for name in wanted:
        # what an earlier part left over is the later ones'
        left = total - (time.monotonic() - start)
        end = time.monotonic() + left * SHARES[name] / shares
        shares -= SHARES[name]
        ran[name] = []
        for command in PARTS[name](options):
            if time.monotonic() > end - 1:
                ran[name].append({"command": shlex.join(command), "status": "no time left"})
            else:
                ran[name].append(run(command, end - time.monotonic()))
            write_record("gpu", {"minutes": options.minutes, "parts": ran}, device, options.output)
    failed = [
        name
        for name, commands in ran.items()
        if any(command["status"] not in (0, "no time left") for command in commands)
    ]
    sys.stdout.write(f"{time.monotonic() - start:.0f} s; failed or cut off: {', '.join(failed) or 'none'}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
