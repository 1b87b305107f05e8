"""What becomes torch_npu.profiler: its names, and the table of kernels that it leaves."""

from __future__ import annotations

import csv
import enum
from pathlib import Path

import npu_sim


class ProfilerActivity(enum.Enum):
    CPU = 0
    NPU = 1


def tensorboard_trace_handler(folder):
    return lambda profiler: profiler.write(Path(folder))


class profile:
    """Has no key_averages, as the real one."""

    def __init__(self, activities=None, schedule=None, on_trace_ready=None):
        self.on_trace_ready = on_trace_ready

    def __enter__(self):
        npu_sim.forget_operators()
        return self

    def __exit__(self, *exception):
        if self.on_trace_ready is not None:
            self.on_trace_ready(self)

    def step(self):
        pass

    def write(self, folder: Path) -> None:
        called = npu_sim.operators()
        slow = npu_sim.slow(called)
        folder = folder / "host_1_20260101000000_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
        folder.mkdir(parents=True)
        with open(folder / "kernel_details.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["Name", "Type", "Accelerator Core"])
            for name in called:
                core = "AI_CPU" if name in slow else "AI_VECTOR_CORE"
                table.writerow([name, name.split("::")[-1], core])
