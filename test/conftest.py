"""What every test has: the project on the path, one thread per process, and ../shared where it exists."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

# Before torch is imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "test", ROOT):  # pytest's own setting does this too, where it finds pyproject.toml
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

torch.set_num_threads(1)

# Started in the background of a script, tests ignore Ctrl-C, and so would the launchers whose answer to it they try.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton decides when it is first imported whether its own functions can be interpreted, as test_triton.py wants them
# where there is no GPU, and parts of torch import it too: so it comes before they do.
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.language")


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out tests that start a process, or are marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session", autouse=True)
def no_processes(request):
    """With --quick a test that comes to start a process is skipped there: nobody has to keep a list."""
    if not request.config.getoption("--quick"):
        yield
        return
    popen = subprocess.Popen.__init__

    def start(self, args, *more, **named):
        if args[0] != "git":  # every record asks it for the commit
            pytest.skip("starts a process: not in --quick")
        popen(self, args, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", start)
        patch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: start(self, [""]))
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture
def tiny_net(monkeypatch):
    """net_mode="tiny" (tiny_net.py), for this test only: others go over all nets that there are."""
    model = importlib.import_module("model")
    monkeypatch.setattr(model, "BACKBONES", dict(model.BACKBONES))
    monkeypatch.delitem(sys.modules, "tiny_net", raising=False)
    importlib.import_module("tiny_net")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the project with real data and golden files."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder 'shared' beside the project: its real data and golden files are not here")
    return folder
