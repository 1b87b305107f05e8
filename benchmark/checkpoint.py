"""Saving and loading a sharded head: seconds, and how much memory loading takes beside the shard that it fills.

    python -m benchmark.checkpoint [--classes 10e6] [--embedding_size 64] [--saved_on 4] [--folder DIR]

A head (weights and momentum, float32) is saved on one rank, cut anew for --saved_on ranks, and read by one rank in a
process of its own, whose peak of memory is compared with the shard that it fills. DIR has to hold the checkpoint twice
(the default is a temporary folder). Writes a dated file with hardware and versions to benchmark/results/.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmark.record import write_record
from checkpoint import reshard, sharded
from runtime.device import Device
from runtime.shard import RowShard

NAMES = ("weight", "momentum")


def save(folder: Path, classes: int, width: int) -> None:
    """Row c of the weight holds c, of the momentum -c."""
    row_C1 = torch.arange(classes, dtype=torch.float32)[:, None]
    tables = {"weight": row_C1.expand(classes, width), "momentum": (-row_C1).expand(classes, width)}
    with sharded.Saver(folder, background=False) as saver:
        saver.save("big", {}, {name: (table, RowShard.of(classes)) for name, table in tables.items()})


def load(path: str, classes: int, width: int) -> dict:
    """In this process: {"seconds", "shard_bytes", "bytes_above": of the peak beside the shard}."""
    torch.set_num_threads(1)
    rows = {name: (torch.ones(classes, width), RowShard.of(classes)) for name in NAMES}
    sharded.load(path, {})  # what torch imports at the first load is not counted
    device = Device("cpu")
    device.reset_peak_memory()
    before, start = device.memory_allocated(), time.perf_counter()
    sharded.load(path, rows)
    seconds = time.perf_counter() - start
    for sign, name in zip((1, -1), NAMES):
        expected_C = sign * torch.arange(classes, dtype=torch.float32)
        if not all(torch.equal(rows[name][0][:, column], expected_C) for column in (0, width - 1)):
            raise SystemExit(f"{name}: other rows came back than were saved")
    return {
        "seconds": seconds,
        "shard_bytes": 2 * 4 * classes * width,
        "bytes_above": device.max_memory_allocated() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--classes", type=float, default=10e6)
    parser.add_argument("--embedding_size", type=int, default=64)
    parser.add_argument("--saved_on", type=int, default=4, help="ranks")
    parser.add_argument("--folder", help="where the checkpoint is put; it is removed afterwards")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    classes, width = int(options.classes), options.embedding_size
    if options.load:
        sys.stdout.write(json.dumps(load(options.load, classes, width)) + "\n")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        start = time.perf_counter()
        save(Path(folder) / "one", classes, width)
        saved = time.perf_counter()
        path = reshard.convert(sharded.newest(Path(folder) / "one"), Path(folder) / "many", options.saved_on)
        converted = time.perf_counter()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmark.checkpoint",
                f"--load={path}",
                f"--classes={classes}",
                f"--embedding_size={width}",
            ],
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    loaded = json.loads(done.stdout)
    content = {
        "classes": classes,
        "embedding_size": width,
        "saved_on": options.saved_on,
        "save_s": round(saved - start, 2),
        "convert_s": round(converted - saved, 2),
        "load_s": round(loaded["seconds"], 2),
        "shard_bytes": loaded["shard_bytes"],
        "bytes_above_shard": loaded["bytes_above"],
        "share_above": round(loaded["bytes_above"] / loaded["shard_bytes"], 4),
    }
    sys.stdout.write(json.dumps(content, indent=1) + "\n")
    write_record("checkpoint", content, Device("cpu"), options.output)


if __name__ == "__main__":
    main()
