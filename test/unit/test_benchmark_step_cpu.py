"""The CPU step benchmark runs, compares like with like, and leaves a record."""

from __future__ import annotations

import json

import torch

from benchmark import step_cpu


def test_it_writes_a_dated_record(tmp_path, capsys):
    step_cpu.main(["--nets", "mobilefacenet", "--batches", "2", "--rounds", "1", "--output", str(tmp_path)])
    (record_file,) = tmp_path.glob("*_step_cpu_torch-*.json")
    record = json.loads(record_file.read_text(encoding="utf-8"))
    assert record["machine"] and record["torch"] == torch.__version__ and record["threads"] >= 1
    forms = [row["form"].split(" ")[0] for row in record["rows"]]
    assert forms == ["plain", "contiguous", "channels_last"]
    assert [row["speedup"] for row in record["rows"] if row["form"] == "plain"] == [1.0]
    assert record_file.with_suffix(".md").read_text(encoding="utf-8") == capsys.readouterr().out[:-1]


def test_every_form_trains():
    for name, step in step_cpu.make_forms("mobilefacenet", 2).items():
        net = next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
        before = net.conv1.bn.running_mean.clone()
        step()
        assert net.training and not torch.equal(net.conv1.bn.running_mean, before), name
