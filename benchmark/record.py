"""One way to write down what was measured: a dated file in benchmark/results/, with hardware, versions and commit."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

import torch

from runtime import files, log

RESULTS = Path(__file__).parent / "results"


def write_record(name: str, content: dict, device=None, folder=RESULTS, command: str | None = None) -> Path:
    """folder/{date}_{name}.json, whole or not at all; again with more content, a benchmark writes as it goes.

    device: a runtime.device.Device, for its description. command: without it this process's own."""
    record = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": command or own_command(),
        "hardware": None if device is None else device.describe(),
        "versions": log.versions(),
        "commit": log.commit(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 1) for value in os.getloadavg()],
        **content,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / f"{time.strftime('%Y-%m-%d')}_{name}.json"
    files.write_json(path, log.plain(record))
    return path


def own_command() -> str:
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return shlex.join(["python", "-m", module.name, *sys.argv[1:]] if module else ["python", *sys.argv])
