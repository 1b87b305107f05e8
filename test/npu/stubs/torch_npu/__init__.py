"""Stands where Ascend's plug-in stands: with this folder on PYTHONPATH, `import torch_npu` brings the emulated NPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

_FOLDER = str(Path(__file__).resolve().parents[2])
if _FOLDER not in sys.path:
    sys.path.append(_FOLDER)

import npu_sim  # noqa: E402

try:
    npu_sim.install()
except npu_sim.build.Unavailable as error:
    raise ImportError(str(error)) from None

from npu_sim import npu, optim  # noqa: E402,F401

__version__ = torch.__version__.split("+")[0]

if os.environ.get("NPU_SIM_PROFILER") == "1":  # the real one's, which other tests do without
    from npu_sim import profiler  # noqa: F401
