"""The step benchmark runs, compares like with like, counts rightly, refuses in one line, and leaves a record."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmark import step
from benchmark.plain_backbones import PLAIN
from model import create_model
from runtime.device import Device
from runtime.errors import DeviceError, PrecisionError

CPU = Device("cpu")
OLD_TORCH = not hasattr(torch, "autocast")

# What the benchmark reads of a baseline's folder, in the smallest form.
PEER = {
    "backbones/__init__.py": """
import torch

def get_model(name, fp16, num_features, dropout):
    assert (name, fp16, num_features, dropout) == ("mbf", False, 512, 0.0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.Flatten(), torch.nn.Linear(4 * 14 * 14, 512))
""",
    "losses.py": "",
    "partial_fc_v2.py": "",
}


def rows_of(folder):
    (file,) = folder.glob("*_step_cpu_torch-*.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    return record, file.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_writes_a_dated_record(tmp_path, capsys):
    step.main(
        [
            "--device",
            "cpu",
            "--nets",
            "mobilefacenet",
            "--batches",
            "2",
            "--rounds",
            "1",
            "--head",
            "50",
            "--fast",
            "plain",
            "default",
            "channels_last+sgd_plain",
            "--output",
            str(tmp_path),
        ]
    )
    record, page = rows_of(tmp_path)
    assert record["hardware"]["name"] and record["versions"]["torch"] == torch.__version__ and record["threads"] >= 1
    assert record["command"].startswith("OMP_NUM_THREADS=") and "--head 50" in record["command"]
    assert [row["form"] for row in record["rows"]] == ["plain", "default", "channels_last+sgd_plain"]
    for row in record["rows"]:
        assert min(row[name] for name in ("images_per_s", "step_s", "peak_MiB", "matmul_share", "speedup")) > 0, row
    assert record["rows"][0]["speedup"] == record["rows"][0]["speedup_cpu"] == 1.0
    assert record["rows"][2]["on"]["memory_format"] == "channels_last" and record["rows"][2]["on"]["sgd"] == "sgd_plain"
    assert page == capsys.readouterr().out[:-1]


@pytest.mark.parametrize("form", ["plain", "default", "contiguous", "channels_last", "copied", "overlapped"])
@pytest.mark.parametrize("policy", ["O0", "bf16"])
def test_every_form_trains(form, policy):
    if policy == "bf16" and OLD_TORCH:
        pytest.skip("bf16 on cpu needs torch 1.10")
    taken = step.Step(step.Case("mobilefacenet", None, 2, policy, step.parse_form(form), classes=20), CPU)
    before = [p.detach().clone() for p in taken.net.parameters()]
    taken()
    after = list(taken.net.parameters())
    assert taken.net.training and sum(not torch.equal(a, b) for a, b in zip(before, after)) > 0.9 * len(before)


def test_forms_over_the_same_weights_take_the_same_step():
    """Gradient and update: the plain formulation's first step is ours in the same layout, to fp32 rounding."""
    taken = {}
    for form in ("plain", "contiguous"):
        one = step.Step(step.Case("mobilefacenet", None, 4, "O0", step.parse_form(form), classes=0), CPU)
        taken[form] = one
    taken["contiguous"].net.load_state_dict(taken["plain"].net.state_dict())
    start = taken["plain"].net.conv1.conv.weight.detach().clone()
    for one in taken.values():
        one.goal_BD = torch.ones(4, 512).cumsum(1) / 512
        one()
    moves = [one.net.conv1.conv.weight.detach() - start for one in taken.values()]
    # our mobilefacenet decays less than the plain one's 5e-4, by at most lr * decay * weight
    slack = step.LR * step.WEIGHT_DECAY * start.norm() + 1e-3 * moves[0].norm()
    assert moves[0].norm() > 0 and (moves[0] - moves[1]).norm() < slack


@pytest.mark.parametrize("net", ["mobilefacenet", "ir_se_50", "iresnet_50"])
def test_the_plain_formulation_is_the_same_net(net):
    step.check_same_numbers(*step.parse_net(net), CPU)


def test_another_net_is_not_taken_for_the_plain_formulation(monkeypatch):
    class Other(PLAIN["mobilefacenet"]):
        def forward(self, x):
            return super().forward(x.flip(3))

    monkeypatch.setitem(step.PLAIN, "mobilefacenet", Other)
    with pytest.raises(step.BenchmarkError, match="mobilefacenet: the two formulations' embeddings differ by"):
        step.check_same_numbers("mobilefacenet", None, CPU)


def test_the_arithmetic_is_counted_as_torch_counts_it():
    flop_counter = pytest.importorskip("torch.utils.flop_counter", reason="torch 2.1 counts")
    backbone = create_model("ir_se", 50).eval()
    with flop_counter.FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, 112, 112)).sum().backward()
    assert step.training_flops(backbone) == counter.get_total_flops()
    # torch counts too much for the backward pass of convolutions in groups: the forward pass, and three times that
    backbone = create_model("mobilefacenet").eval()
    with torch.no_grad(), flop_counter.FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, 112, 112))
    first = 2 * 64 * 3 * 3 * 3 * 56 * 56
    assert step.training_flops(backbone) == 3 * counter.get_total_flops() - first


@pytest.mark.slow
def test_a_baseline_is_measured_beside_ours(tmp_path, monkeypatch):
    for name, text in PEER.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if OLD_TORCH:
        with pytest.raises(step.BenchmarkError, match="--baseline: arcface_torch needs torch 1.11"):
            step.main(["--device", "cpu", "--baseline", str(tmp_path)])
        return
    try:
        step.main(
            [
                "--device",
                "cpu",
                "--nets",
                "mobilefacenet",
                "--batches",
                "2",
                "--rounds",
                "1",
                "--fast",
                "default",
                "--baseline",
                str(tmp_path),
                "--output",
                str(tmp_path / "out"),
            ]
        )
    finally:
        for name in ("backbones", "losses", "partial_fc_v2"):
            sys.modules.pop(name, None)
    record, _ = rows_of(tmp_path / "out")
    ours, baseline = record["rows"]
    assert (ours["form"], baseline["form"]) == ("default", "baseline") and baseline["images_per_s"] > 0
    macs = 14 * 14 * 4 * 3 * 64 * 2 + 4 * 14 * 14 * 512 * 3
    assert baseline["GFLOP_per_image"] == round(2 * macs / 1e9, 2) < ours["GFLOP_per_image"]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("words, error, message", [
    (["--fast", "plain+foo"], step.BenchmarkError, "--fast plain\\+foo: 'foo' is no fast path; choose from default"),
    (["--fast", "baseline"], step.BenchmarkError, "--fast baseline: say with --baseline where"),
    (["--nets", "vgg"], step.BenchmarkError, "--nets vgg: name a net as in ir_50"),
    (["--nets", "resnet50"], step.BenchmarkError, "--nets resnet_50: it has no plain formulation .*leave plain out"),
    (["--policies", "O5"], PrecisionError, "opt_level 'O5': choose from O0"),
    (["--baseline", "nowhere"], step.BenchmarkError, "--baseline nowhere: no backbones/__init__.py in it; give"),
    (["--rounds", "0"], step.BenchmarkError, "--rounds 0: must be at least 1"),
    (["--head", "-1"], step.BenchmarkError, "--head -1: must be at least 0"),
    (["--device", "tpu"], DeviceError, "device 'tpu': choose from auto"),
])  # fmt: skip
def test_what_cannot_be_measured_is_one_line(words, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        step.main(["--device", "cpu", "--output", str(tmp_path), *words])
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_out_of_memory_leaves_a_row_that_says_so(monkeypatch):
    case = step.Case("mobilefacenet", None, 2, "O0", step.parse_form("default"), 0)
    monkeypatch.setattr(step, "peak_memory", lambda *_: None)
    (row,) = step.rows_of([case], CPU, 1, 1)
    assert row["note"] == "out of memory" and "images_per_s" not in row


def test_insightface_pytorchs_step_is_taken_from_its_model_file(tmp_path):
    (tmp_path / "Learner.py").write_text("import bcolz_that_is_gone")
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Backbone(nn.Sequential):\n"
        "    def __init__(self, depth, dropout, mode):\n"
        "        assert (depth, dropout, mode) == (50, 0.6, 'ir_se')\n"
        "        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(4, 512))\n"
        "class Arcface(nn.Module):\n"
        "    def __init__(self, width, classes):\n"
        "        super().__init__()\n"
        "        self.kernel = nn.Parameter(torch.randn(width, classes))\n"
        "    def forward(self, x, label):\n"
        "        return x @ self.kernel\n"
    )
    options = SimpleNamespace(
        nets=["ir_se_50"], batches=[2], fast=["baseline"], policies=None, head=5, baseline=tmp_path
    )
    ((case,),) = step.plan(options, CPU)
    taken = step.Step(case, CPU)
    before = [p.clone() for p in taken.net.parameters()]
    taken()
    assert taken.on["opt_level"] == "fp32" and taken.on["memory_format"] == "contiguous"
    assert not torch.equal(before[0], next(taken.net.parameters()))
