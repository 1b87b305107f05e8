"""The machine that the program runs on: its memory, its cores, its name. Knows nothing of torch."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from contextlib import suppress


def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors give up instead of handing each big block back to the system.

    Otherwise every step has its activations' pages zeroed anew, half of a MobileFaceNet step's time at batch 64
    (benchmark/step.py). Where the C library has no such switch, nothing changes.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of mallopt(3)'s parameters in glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)


def process_memory() -> int:
    """The resident set of this process, in bytes."""
    return _status("VmRSS")


def process_memory_peak() -> int:
    """The largest resident set so far, in bytes."""
    return _status("VmHWM")


def reset_process_memory_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # proc(5): resets the peak resident set size
    except OSError:
        pass  # not Linux, or not allowed: the peak is then that of the whole process


def total_memory() -> int:
    """The machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_left() -> int:
    """Bytes that processes can still get: of the machine, or of the container (cgroup v2 or v1) if it has less."""
    try:
        with open("/proc/meminfo") as file:
            left = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return total_memory()
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            with open(f"{folder}/{limit}") as most, open(f"{folder}/{used}") as now:
                room = int(most.read()) - int(now.read())
            with open(f"{folder}/memory.stat") as file:  # files read lately count as used, and give way
                room += next(int(line.split()[1]) for line in file if line.startswith("inactive_file "))
        except (OSError, ValueError, StopIteration):  # no such cgroup, or no limit ("max")
            continue
        left = min(left, max(0, room))
    return left


@functools.cache
def allowed_cores() -> frozenset:
    """Numbers of the cores that this process may use, as they were at the first call: a device that opens may take
    some away."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def raise_open_files() -> None:
    """Let this process open as many files as the system allows: devices, ranks and loaders need more than 1024."""
    try:
        import resource
    except ImportError:  # not Unix
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {len(allowed_cores())} cores"


def _status(field: str) -> int:
    """A size from /proc/self/status in bytes; elsewhere than on Linux the peak that getrusage knows."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field + ":")) * 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
