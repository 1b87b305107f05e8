"""runtime/ascend.py: where a machine stands among the versions that go together, and what its errors mean."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from runtime import ascend
from runtime.device import Device
from runtime.dist import _hccl_timeout, _Roll
from runtime.errors import DeviceError, RankError

pytestmark = pytest.mark.core


def standing(torch="2.7.1+cpu", torch_npu="2.7.1", cann="8.3.RC1", python="3.11.4", numpy="1.26.4"):
    return ascend.standing(torch, torch_npu, cann, python, numpy)


def test_versions_that_go_together():
    assert standing() == "torch_npu 2.7.1: torch, CANN, Python and numpy go with it"
    assert standing("1.8.1", "1.8.1.post2", "6.3.RC2", "3.9.2").endswith("go with it")


@pytest.mark.parametrize(
    "versions, said",
    [
        ({"cann": "8.2.RC1", "torch": "2.6.0"}, "torch is 2.6.0: install 2.7.1; CANN is 8.2.RC1: install 8.3"),
        ({"cann": "8.5.0"}, "CANN is 8.5.0: install 8.3, or torch_npu 2.7.1.post2"),
        ({"cann": None}, "CANN is not found: install 8.3, and `source test/env_npu.sh`"),
        ({"python": "3.8.10"}, "Python is 3.8.10: take 3.9 to 3.13"),
        ({"torch": "2.1.0", "torch_npu": "2.1.0.post12", "cann": "8.1.RC1", "numpy": "2.0.1"},
         "numpy is 2.0.1: pip install 'numpy<2'"),
        ({"torch_npu": "2.7.1.post99"}, "torch_npu 2.7.1.post99 is not in the table; for torch 2.7.1: CANN 9.1 with "
         "torch==2.7.1 torch-npu==2.7.1.post8"),
        ({"torch_npu": None}, "for torch 2.7.1: CANN 9.1 with torch==2.7.1 torch-npu==2.7.1.post8; CANN 9.0 with"),
        ({"torch_npu": None, "torch": "2.15.0"}, "for torch 2.15.0: none is known; CANN 9.1 with torch==2.12.0"),
    ],
)  # fmt: skip
def test_versions_that_do_not(versions, said):
    assert said in standing(**versions)


@pytest.mark.parametrize("page", ["docs/npu.md", "docs/npu_zh.md"])
def test_the_pages_show_the_table(root, page):
    assert ascend.table() in (root / page).read_text(encoding="utf-8")


def test_both_pages_give_the_same_commands(root):
    def commands(page):
        blocks = re.findall(r"```bash\n(.*?)```", (root / "docs" / page).read_text(encoding="utf-8"), re.S)
        return [line.split("  #")[0].split() for block in blocks for line in block.splitlines()]

    assert commands("npu.md") == commands("npu_zh.md") and len(commands("npu.md")) > 20


@pytest.mark.parametrize(
    "said, meaning",
    [
        ("dcmi model initialized failed, because the device is used. ret is -8020", "another container or process"),
        ("DrvMngGetConsoleLogLevel failed.\ndcmi module initialize failed. ret is -8005", "/dev/hisi_hdc"),
        ("HCCL function error, error code is 11\nEJ0003: Failed to bind the IP port.", "HCCL_IF_BASE_PORT"),
        ("Communication_Error_Bind_IP_Port(EI0019)", "HCCL_IF_BASE_PORT"),
        ("failed to bind to [::]:29500 (errno: 98 - Address already in use).", "MASTER_PORT"),
        ("EI0006: wait socket establish timeout, role[0] rank[0] timeout[120 s]", "HCCL_CONNECT_TIMEOUT"),
        ("EI0015 topo exchange: Failed to connect agent[1,3,5,7,]", "some ranks never came"),
        ("The driver version does not match: versions are inconsistent", "of different releases"),
    ],
)
def test_usual_errors_are_explained(said, meaning):
    assert meaning in ascend.explain(said)
    with pytest.raises(DeviceError) as caught, Device("npu").failures_explained():
        raise RuntimeError(f"NPU function error: {said.replace('HCCL', 'H')}")
    assert meaning in str(caught.value) and "\n" not in str(caught.value)


def test_other_errors_are_not():
    assert ascend.explain("shapes do not match") is None


def test_a_timeout_that_is_no_number_is_one_line(monkeypatch):
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "300")
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "68")
    assert _hccl_timeout(100) == 360
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "30min")
    with pytest.raises(RankError, match="^HCCL_EXEC_TIMEOUT=30min: give whole seconds, or leave it unset$"):
        _hccl_timeout(100)


def test_the_torch_that_is_there_is_not_replaced_by_another(root, tmp_path):
    """An Ascend image brings the torch that its torch_npu belongs to; pip would take a newer one with torchvision."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"""#!/bin/sh
if [ "$2" = pip ]; then echo "$@" >{tmp_path}/pip; exit; fi
if [ -n "$2" ]; then exec {sys.executable} -c "import importlib.metadata
importlib.metadata.version = lambda name: '2.1.0+npu'
$2"; fi
""")
    python.chmod(0o755)
    (tmp_path / "some.txt").write_text("torchvision\n")
    command = f"source scripts/environment.sh; make_environment {tmp_path}/env {sys.executable} {tmp_path}/some.txt"
    subprocess.run(["bash", "-c", command], cwd=root, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "pip").read_text().split()[-2:] == ["torch==2.1.0", "numpy<2"]


def test_what_hccl_said_in_the_middle_of_a_run_is_explained_beside_the_rank(monkeypatch):
    roll = object.__new__(_Roll)
    roll.size = 8
    monkeypatch.setattr(_Roll, "_blame", lambda self: ("rank 3 hangs: see its log", 1))
    monkeypatch.setattr(_Roll, "_leave", lambda self, lost: None)
    said = RuntimeError("call hccl api failed. EI0013: an error CQE occurred during operator execution")
    assert roll.explain(said, hccl=True) == f"rank 3 hangs: see its log (of 8 ranks; {ascend.explain(str(said))})"
    assert "the collective said: call hccl api failed" in roll.explain(said)
