"""The emulated NPU for every test in this folder: `python -m pytest test/npu`, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
STUBS = HERE / "stubs"
for folder in (HERE, STUBS):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from npu_sim import build  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def emulated_npu(request):
    """Installs the device as a program finds it, by `import torch_npu`; skips where it cannot be had."""
    if any(HERE not in item.path.parents for item in request.session.items):
        pytest.skip("the emulated NPU needs a process of its own: python -m pytest test/npu")
    try:
        build.library()
    except build.Unavailable as error:
        pytest.skip(str(error))
    import torch_npu

    return torch_npu


@pytest.fixture
def npu_python(root, tmp_path):
    """run(*arguments, **environment) -> a finished process of Python that finds the emulated NPU as a program finds
    the real one: torch_npu is on its path."""

    def run(*arguments, **environment):
        path = os.pathsep.join([str(STUBS), str(HERE), str(root), str(root / "test")])
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )

    return run
