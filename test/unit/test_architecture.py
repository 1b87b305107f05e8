"""The rules of the house (CONTRIBUTING.md): who imports whom, where devices are named, what is written down."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {".venv", "test", "benchmark", "build", "work_space"}

# Each part may import from the parts named here, and from itself.
BOTTOM: set = set()
ALLOWED = {
    "runtime": BOTTOM,
    "config": {"runtime.errors", "runtime.address"},
    "data": {"runtime.errors", "runtime.files", "runtime.log"},
    "verify.protocol": {"runtime.errors"},
    "model": {"runtime"},
    "head": {"runtime"},
    "optim": {"runtime"},
    "checkpoint": {"runtime"},
    "verify": {"runtime"},
    "recognizer": {"runtime", "data", "model", "checkpoint", "verify"},
    "learner": {"config", "runtime", "data", "model", "head", "optim", "checkpoint", "verify", "recognizer"},
    "configs": {"config", "runtime.errors", "runtime.files"},
    "deploy": {"runtime", "data", "checkpoint", "verify", "recognizer"},
}
ON_TOP = {"train", "evaluate", "export", "report", "plsc", "tools", "scripts"}
ON_TOP |= {"eval", "insightface_paddle", "plsc_serving", "face_service"}
OURS = {name.split(".")[0] for name in ALLOWED} | ON_TOP


def sources():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if not any(part in SKIPPED or part.startswith(".") for part in parts):
            yield path, ".".join(parts)[: -len(".py")]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(module):
    return "verify.protocol" if module.startswith("verify.protocol") else module.split(".")[0]


def test_imports_go_downward_only():
    wrong = []
    for path, module in sources():
        part = part_of(module)
        if part in ON_TOP:
            continue
        assert part in ALLOWED, f"{path.relative_to(ROOT)}: a new part of the house; give it its place in ALLOWED"
        for name in imported(path):
            other = name.split(".")[0]
            allowed = any(name == a or name.startswith(a + ".") for a in ALLOWED[part])
            if other in OURS and other != part.split(".")[0] and not allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_nothing_imports_what_stands_on_top():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, module in sources()
        if part_of(module) not in ON_TOP
        for name in imported(path)
        if name.split(".")[0] in ON_TOP
    ]
    assert not wrong, wrong


def test_devices_are_named_in_one_place():
    wrong = []
    for path, module in sources():
        if module == "runtime.device" or module.startswith("head.ops"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "torch"
                and node.attr in ("cuda", "npu")
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} torch.{node.attr}")
        wrong += [f"{path.relative_to(ROOT)} imports {n}" for n in imported(path) if n.split(".")[0] == "torch_npu"]
        if module not in ("runtime.apex", "optim"):
            wrong += [f"{path.relative_to(ROOT)} imports {n}" for n in imported(path) if n.split(".")[0] == "apex"]
    assert not wrong, wrong


@pytest.mark.core
def test_importing_opens_nothing():
    """No module touches a device, a process group or the environment when it is imported."""
    modules = [m[: -len(".__init__")] if m.endswith(".__init__") else m for _, m in sources()]
    # the kernels themselves are Triton's language, and loaded only where Triton is
    kernels = ("head.ops.triton", "head.ops.triton_kernels")
    modules = [m for m in modules if not m.endswith("__main__") and m not in kernels]
    code = f"""
import os, sys
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch
before = dict(os.environ)
for name in {modules!r}:
    __import__(name)
assert dict(os.environ) == before, set(os.environ) ^ set(before)
assert not (torch.distributed.is_available() and torch.distributed.is_initialized())
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_every_public_address_is_stated():
    stated = (ROOT / "public_address_statement.md").read_text(encoding="utf-8")
    pattern = re.compile(r"https?://[^\s\"'`<>)\]]+")
    missing = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if path.suffix not in (".py", ".sh", ".txt", ".toml", ".cpp") or any(
            p in (".venv", "build", "work_space") or p.startswith(".venv") for p in parts
        ):
            continue
        if parts[:2] == ("test", "output") or parts[0] == "data" and len(parts) > 2:
            continue
        for url in pattern.findall(path.read_text(encoding="utf-8", errors="replace")):
            local = re.match(r"https?://(127\.0\.0\.1|localhost|\{|%)", url)
            if not local and url.rstrip(".,;:") not in stated:
                missing.append(f"{path.relative_to(ROOT)}: {url}")
    assert not missing, missing


def test_the_network_table_agrees_with_the_options():
    import dataclasses

    import config
    import model

    fields = {f.name: f for f in dataclasses.fields(config.Config)}
    assert set(fields["net_mode"].metadata["known"]) == set(model.BACKBONES)
    from head.margins import MARGINS

    assert set(fields["loss_type"].metadata["known"]) == set(MARGINS)
    from runtime.precision import POLICIES

    assert set(fields["opt_level"].metadata["choices"]) - {"auto"} == set(POLICIES)
    from data import pairs

    assert config.VERIFICATION_SETS == tuple(pairs.VERIFICATION_SETS)
