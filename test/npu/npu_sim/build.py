"""Compiles npu_sim.cpp once for each version of torch and of the source, into the project's build/ folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("npu_sim.cpp")
CACHE = Path(__file__).resolve().parents[3] / "build" / "npu_sim"
# -O0: compiling takes longer than everything that the tests run through it.
FLAGS = ("-O0", "-std=c++20", "-shared", "-fPIC")


class Unavailable(RuntimeError):
    """The emulated NPU cannot be had here; the message is one line with the reason."""


def library() -> Path:
    """The compiled library for this torch; builds it (about 15 s) where the cache has none. Raises Unavailable."""
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 13):
        raise Unavailable(f"the emulated NPU needs torch 2.13 or newer, this is {torch.__version__}")
    key = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, torch.__version__)).encode()).hexdigest()[:16]
    path = CACHE / f"torch_{torch.__version__.split('+')[0]}_{key}.so"
    if path.exists():
        return path
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise Unavailable("the emulated NPU needs a C++ compiler: install g++ or clang++, or set CXX")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:  # test processes come at the same time: one builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    root = Path(torch.__file__).parent
    unfinished = path.with_suffix(".tmp")
    command = [
        compiler,
        *FLAGS,
        f"-I{root / 'include'}",
        f"-I{root / 'include/torch/csrc/api/include'}",
        str(SOURCE),
        "-o",
        str(unfinished),
        f"-L{root / 'lib'}",
        "-lc10",
        "-ltorch_cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    unfinished.replace(path)
