"""bash test/npu_check.sh, whole, on the emulated NPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
from conftest import HERE, STUBS

pytestmark = pytest.mark.npu


@pytest.fixture
def check(root, tmp_path):
    def run(*options, **environment):
        path = os.pathsep.join([str(STUBS), str(HERE)])
        done = subprocess.run(
            ["bash", str(root / "test" / "npu_check.sh"), "--quick", f"--output={tmp_path / 'check'}", *options],
            cwd=tmp_path, capture_output=True, text=True, timeout=600,
            env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path, "NPU_SIM_PROFILER": "1", **environment},
        )  # fmt: skip
        rows = json.loads((tmp_path / "check" / "npu_check.json").read_text())
        return done, {(row["section"], row["check"]): row for row in rows}

    return run


def of(rows, section):
    return {check: row["status"] for (where, check), row in rows.items() if where == section}


def test_a_good_machine(check, tmp_path):
    done, rows = check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(of(rows, "limits").values()) == {"ok"} and len(of(rows, "limits")) >= 9
    operators = of(rows, "operators")
    assert len(operators) > 60 and set(operators.values()) == {"ok"}, [k for k, v in operators.items() if v != "ok"]
    assert {"convolution float16", "convolution_backward float32", "native_batch_norm float32"} <= {
        name.replace("convolution_overrideable", "convolution").replace("convolution_backward_overrideable",
        "convolution_backward") for name in operators}, sorted(operators)  # fmt: skip
    assert set(of(rows, "slow operators").values()) == {"ok"}
    assert set(of(rows, "training").values()) == {"ok"} and len(of(rows, "training")) == 4
    assert len(of(rows, "collectives")) == 20 and set(of(rows, "collectives").values()) == {"ok"}
    assert of(rows, "speed")["O2, npu_fused_sgd"] == "ok" and "images/s" in rows["speed", "O0"]["detail"]
    page = (tmp_path / "check" / "npu_check.html").read_text()
    assert "Ascend910B3" in page and "convolution" in page and done.stdout.splitlines()[-1].endswith("npu_check.html")


def test_operators_on_the_host_are_noted_and_other_warnings_pass():
    from check import fallbacks_noted

    said = "CAUTION: The operator 'aten::x' is not supported on the NPU backend and will fall back to run on the CPU."
    with pytest.warns(UserWarning, match="^another$"), fallbacks_noted() as fallen:
        warnings.warn(said, stacklevel=1)
        warnings.warn(said.replace("aten::x", "aten::_fused_sgd_"), stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert fallen == [said]


def test_a_first_chip_is_as_torch_npu_says(check):
    done, rows = check("--sections", "limits", "collectives", NPU_SIM_SATURATE="1", NPU_SIM_BF16="0",
                       NPU_SIM_NAME="Ascend910A", NPU_SIM_DEVICES="1")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(of(rows, "limits").values()) == {"ok"}
    assert "65504" in rows["limits", "fp16 overflow"]["detail"]
    assert of(rows, "collectives")["hccl"] == "not checked"


def test_a_machine_where_operators_are_wrong_fails_and_names_them(check):
    done, rows = check("--sections", "training", NPU_SIM_DENY="aten::_prelu_kernel")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert of(rows, "training")["the check itself"] == "failed"
    assert "_prelu_kernel" in rows["training", "the check itself"]["detail"]
