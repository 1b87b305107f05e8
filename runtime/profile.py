"""A trace of a few training steps, and the ten most expensive operations in it."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime.device import Device
from runtime.errors import DeviceError
from runtime.files import write_text

logger = logging.getLogger(__name__)

SKIPPED, WARMUP, TRACED = 3, 1, 4  # steps: kernels compile and caches fill in the first ones


class _Off:
    def step(self) -> None:
        pass


@contextmanager
def profiled(device: Device, folder, enabled: bool = True):
    """Yields an object whose step() belongs after every training step.

    Leaves trace.json (chrome://tracing, Perfetto, tensorboard and MindStudio open it) and operations.txt in `folder`
    once SKIPPED + WARMUP + TRACED steps have passed; fewer leave a line in the log and no trace.
    Raises DeviceError where this torch's profiler is too old.
    """
    if not enabled:
        yield _Off()
        return
    module = device.profiler_module()
    if tuple(map(int, torch.__version__.split(".")[:2])) < (1, 9):  # 1.8's profiler takes minutes over a trace
        raise DeviceError(f"--profile needs torch 1.9 or newer, and this is {torch.__version__}: leave it out")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = []

    def write(profiler) -> None:
        profiler.export_chrome_trace(str(folder / "trace.json"))
        table = ""
        if hasattr(profiler, "key_averages"):  # Ascend's own keeps its tables in the trace's folder
            table = _table(profiler.key_averages(), device.kind)
            write_text(folder / "operations.txt", table)
        done.append(True)
        logger.info("%d steps traced in %s\n%s", TRACED, folder / "trace.json", table)

    schedule = module.schedule(wait=SKIPPED, warmup=WARMUP, active=TRACED, repeat=1)
    activities = device.profiler_activities()
    with module.profile(activities=activities, schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler
    if not done:
        logger.warning("--profile: the run ended before its step %d, nothing was traced", SKIPPED + WARMUP + TRACED)


def _table(averages, kind: str) -> str:
    """The ten operations with most time of their own, on the device where there is one."""
    averages[:] = [one for one in averages if not one.key.startswith("ProfilerStep")]  # a mark, not an operation
    columns = ["self_device_time_total", f"self_{kind}_time_total", "self_cpu_time_total"]
    by = next(c for c in columns[2 * (kind == "cpu") :] if hasattr(averages[0], c))  # torch renamed the device's in 2.4
    return averages.table(sort_by=by, row_limit=10)
