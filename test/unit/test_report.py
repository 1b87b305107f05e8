"""The report: what tools read, the JSON, the page; and runs that must not be reported as a success."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest

import report
from report import __main__ as command
from runtime.dist import ALONE
from runtime.errors import ReportError
from runtime.log import RunLog

pytestmark = pytest.mark.core

CONFIG = {"batch_size": 512, "val_targets": ["lfw", "cfp_fp"], "resume": ""}
FAST = {"memory_format": "channels_last", "sgd": "sgd_fused", "static": True, "tf32": False}
DEVICE = {"name": "A <device>", "kind": "cpu", "count": 1, "machine": "aarch64"}
ROC = {"fpr": [0.0, 0.001, 0.2, 1.0], "tpr": [0.0, 0.5, 0.9, 1.0]}
PNG = b"\x89PNG\r\n\x1a\n and so on"


def begin(log, **values):
    log.record(
        "run", **{"case": "", "network": "ir_se_100", "batch_size": 256, "device": DEVICE, "fast_paths": FAST, **values}
    )


def step(log, number, **values):
    log.record("step", **{
        "step": number, "epoch": 0, "loss": 40.0 / number, "lr": 0.1, "accuracy": 0.25, "images_per_s": 90.0 + number,
        "damaged": 0, **values,
    })  # fmt: skip


def verified(log, number, name, accuracy, **values):
    log.record("verify", **{
        "step": number, "epoch": 0, "set": name, "accuracy": accuracy, "std": 0.01, "threshold": 1.5, "pairs": 6000,
        "tar_at_far": {"0.001": 0.9, "0.0001": None}, "roc": ROC, "untrained": False,
        "tar_at_far_why_not": {"0.0001": "needs 10000 different pairs, the set has 3000"}, **values,
    })  # fmt: skip


@pytest.fixture
def run_log(tmp_path):
    with RunLog(tmp_path, ALONE, CONFIG, tensorboard=False) as log:
        yield log


def finish(log, reason="finished"):
    log.record("end", seconds=12.34, reason=reason, steps=20)


def whole_run(log):
    begin(log)
    verified(log, 0, "cfp_fp", 0.5, untrained=True)
    verified(log, 0, "lfw", 0.52, untrained=True)
    for number in (10, 20):
        step(log, number)
        verified(log, number, "cfp_fp", 0.6)
        verified(log, number, "lfw", 0.7 + number / 1000)
        log.record("window", images=2560 * number, seconds=10.0 * number / 10, steps=number, images_per_s=1.0)
    finish(log)


def texts(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads((folder / "report.json").read_text(encoding="utf-8")), page


def test_the_lines_that_tools_read(run_log, tmp_path, capsys):
    whole_run(run_log)
    command.main([str(tmp_path), "--case", "LResNet100E_bs512_2p_acc"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "set     net        pairs  accuracy         threshold  TAR at FAR 0.001  TAR at FAR 0.0001",
        "lfw     untrained  6000   0.5200 ± 0.0100  1.500      0.9000            -",
        "lfw     trained    6000   0.7200 ± 0.0100  1.500      0.9000            -",
    ]
    assert printed[-4:] == [
        "------------------ Final result ------------------",
        "Final Performance images/sec : 2560.00",
        "Final Train Accuracy : 0.72000",
        "E2E Training Duration sec : 12",
    ]
    assert (tmp_path / "LResNet100E_bs512_2p_acc.log").read_text() == (
        "Network = ir_se_100\nRankSize = 1\nBatchSize = 512\nDeviceType = aarch64\n"
        "CaseName = LResNet100E_bs512_2p_acc\nActualFPS = 2560.00\nTrainingTime = 200.00\nTrainAccuracy = 0.72000\n"
        "ActualLoss = 2.000000\nE2ETrainingTime = 12\n"
    )


def test_the_json_holds_the_numbers_and_says_what_they_are(run_log, tmp_path):
    whole_run(run_log)
    command.main([str(tmp_path), "--output", str(tmp_path / "out")])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "ir_se_100_bs512_1p_acc.log", "report.json", "report.html"
    }  # fmt: skip
    numbers, _ = texts(tmp_path / "out")
    assert numbers["accuracy"] == 0.72 and numbers["accuracy_is"] == "verification on lfw after step 20"
    assert numbers["images_per_s"] == 2560 and "51,200 training images" in numbers["images_per_s_is"]
    assert numbers["loss"] == 2.0 and numbers["seconds"] == 12.34 and numbers["complete"] is True
    assert [entry["set"] for entry in numbers["verification"]] == ["lfw", "cfp_fp"]  # the order of the targets
    assert numbers["verification"][0]["untrained"]["accuracy"] == 0.52
    assert numbers["verification"][0]["trained"]["accuracy"] == 0.72
    assert numbers["fast_paths"] == FAST
    assert numbers["config"] == CONFIG and numbers["versions"]["torch"]


def test_the_page_stands_alone_and_shows_everything(run_log, tmp_path):
    pytest.importorskip("matplotlib")
    whole_run(run_log)
    (tmp_path / "contact_sheet.png").write_bytes(PNG)
    command.main([str(tmp_path)])
    _, page = texts(tmp_path)
    assert not re.search(r"https?://|<script|<link|@import", page)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    for title in ("Loss", "Accuracy", "Learning rate", "Throughput", "ROC", "contact sheet"):
        assert f'alt="{title}"' in page
    assert "A &lt;device&gt;" in page and "A <device>" not in page
    assert "0.7200 ± 0.0100" in page and "0.5200 ± 0.0100" in page
    assert "lfw: TAR at FAR 0.0001 needs 10000 different pairs, the set has 3000" in page
    assert "<h2>Fast paths</h2>" in page and "<td>sgd</td><td>sgd_fused</td>" in page
    assert "What is not here" not in page


def test_the_page_says_what_is_missing(run_log, tmp_path, monkeypatch):
    begin(run_log)
    step(run_log, 1, loss=math.nan, lr=None, accuracy=None)
    finish(run_log)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command.main([str(tmp_path)])
    numbers, page = texts(tmp_path)
    assert "matplotlib is not installed" in page and "<figure>" not in page
    assert "no contact sheet" in page and "nothing was verified" in page
    assert numbers["images_per_s"] is None and "not measured" in numbers["images_per_s_is"]
    assert numbers["loss"] is None and numbers["steps_with_a_loss_that_is_not_finite"] == 1
    assert (tmp_path / "ir_se_100_bs512_1p_acc.log").read_text().splitlines()[5:9] == [
        "ActualFPS = none", "TrainingTime = none", "TrainAccuracy = none", "ActualLoss = none",
    ]  # fmt: skip


def test_what_a_set_cannot_tell_is_said_below_the_table(run_log, tmp_path, capsys):
    begin(run_log)
    step(run_log, 5)
    verified(run_log, 5, "lfw", 1.0, caution="all 20 pairs are equal: no accuracy can be told")
    finish(run_log)
    command.main([str(tmp_path)])
    assert texts(tmp_path)[0]["accuracy"] == 0.25  # of training: that of the set means nothing
    (row,) = (line for line in report.result_lines(texts(tmp_path)[0]["verification"]) if line.startswith("lfw  "))
    assert "1.0000" not in row
    line = "lfw: all 20 pairs are equal: no accuracy can be told"
    assert line in capsys.readouterr().out.splitlines() and line in texts(tmp_path)[1]


def test_without_verification_the_accuracy_is_the_trainings(run_log, tmp_path, capsys):
    begin(run_log)
    step(run_log, 5, accuracy=0.125)
    finish(run_log, "max_iter")
    command.main([str(tmp_path)])
    assert "Final Train Accuracy : 0.12500" in capsys.readouterr().out
    assert texts(tmp_path)[0]["accuracy_is"] == "top-1 on the training images of step 5 (no set was verified)"


def test_an_evaluation_has_its_own_lines(run_log, tmp_path, capsys):
    begin(run_log, task="evaluate", case="eval")
    verified(run_log, 0, "lfw", 0.9967)
    finish(run_log)
    command.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "Final Eval Accuracy : 0.99670", "E2E Eval Duration sec : 12"
    ]  # fmt: skip
    assert (tmp_path / "eval.log").read_text() == (
        "Network = ir_se_100\nRankSize = 1\nBatchSize = 256\nDeviceType = aarch64\nCaseName = eval\n"
        "EvalAccuracy = 0.99670\nE2EEvalTime = 12\n"
    )


def test_long_curves_get_a_running_mean(run_log, tmp_path):
    pytest.importorskip("matplotlib")
    begin(run_log)
    for number in range(1, 121):
        step(run_log, number, loss=math.nan if number == 60 else 1.0)
    finish(run_log)
    command.main([str(tmp_path)])
    assert 'alt="Loss"' in texts(tmp_path)[1]
    assert report.page._running_mean([1, 2, 3, 4], [2.0, 4.0, 6.0, 8.0]) == ([2, 3, 4], [3.0, 5.0, 7.0])


# --- several runs in one folder --------------------------------------------------------------------------------------


def rerun(folder, resume):
    with RunLog(folder, ALONE, {**CONFIG, "resume": resume}, tensorboard=False) as log:
        begin(log)
        step(log, 20, loss=7.0)
        verified(log, 20, "lfw", 0.8)
        finish(log)


def test_a_resumed_run_continues_the_curves(run_log, tmp_path):
    begin(run_log)
    verified(run_log, 0, "lfw", 0.52, untrained=True)
    for number in (10, 20, 30):
        step(run_log, number)
    rerun(tmp_path, "auto")
    numbers, curves = report.summarise(report.read_metrics(tmp_path / "metrics.jsonl"))
    assert [(line["step"], line["loss"]) for line in curves["steps"]] == [(10, 4.0), (20, 7.0)]
    assert numbers["verification"][0]["untrained"]["accuracy"] == 0.52
    assert numbers["loss"] == 7.0


def test_a_new_run_in_the_same_folder_starts_afresh(run_log, tmp_path):
    whole_run(run_log)
    rerun(tmp_path, "")
    numbers, curves = report.summarise(report.read_metrics(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in curves["steps"]] == [20]
    assert numbers["verification"][0]["untrained"] is None


def test_a_line_that_a_killed_run_tore_does_not_hinder_the_resumed_one(run_log, tmp_path):
    begin(run_log)
    step(run_log, 10)
    step(run_log, 20)
    run_log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    rerun(tmp_path, "auto")
    assert report.summarise(report.read_metrics(path))[0]["loss"] == 7.0


# --- no report of success --------------------------------------------------------------------------------------------


def refused(folder, words):
    with pytest.raises(ReportError, match=words) as error:
        command.main([str(folder)])
    assert "\n" not in str(error.value)
    assert not list(folder.glob("*.log"))


def test_a_run_without_numbers_is_an_error(run_log, tmp_path):
    refused(tmp_path, r"metrics\.jsonl is empty")
    refused(tmp_path / "elsewhere", "cannot be read .*No such file")
    begin(run_log)
    refused(tmp_path, "no end line: it was killed, or is still going")
    finish(run_log)
    refused(tmp_path, "no training step")


def test_a_file_without_a_beginning_is_an_error(run_log, tmp_path):
    step(run_log, 1)
    finish(run_log)
    refused(tmp_path, "no run line")


def test_an_evaluation_without_a_set_is_an_error(run_log, tmp_path):
    begin(run_log, task="evaluate")
    finish(run_log)
    refused(tmp_path, "had no verification set")


@pytest.mark.parametrize("place", [11, 12])
def test_a_file_that_was_cut_off_is_an_error(run_log, tmp_path, place):
    whole_run(run_log)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: place - 1]) + lines[place - 1][: len(lines[place - 1]) // 2])
    refused(tmp_path, f"line {place} is damaged")


@pytest.mark.parametrize("line", [b"\x00\xff\n", b"[1, 2]\n", b'{"kind": "st\n'])
def test_a_damaged_line_is_an_error(run_log, tmp_path, line):
    whole_run(run_log)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], line, *lines[3:]]))
    refused(tmp_path, "line 4 is damaged")


WRONG = (None, True, "12", -1, 1e200, [1], {"a": 1}, [None], "<b>")


@pytest.mark.parametrize("name", ["run", "step", "verify", "window", "end"])
def test_a_value_of_a_wrong_type_is_one_line_or_does_no_harm(run_log, tmp_path, name):
    """Every value of every kind of line, by every kind of wrong value: a report, or one line."""
    whole_run(run_log)
    path = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    place = next(i for i, line in enumerate(lines) if line["kind"] == name)
    refusals = 0
    for key in (*report.metrics.LINES[name], "kind"):
        for wrong in WRONG:
            changed = [*lines[:place], {**lines[place], key: wrong}, *lines[place + 1 :]]
            path.write_text("".join(json.dumps(line) + "\n" for line in changed))
            try:
                numbers, curves = report.summarise(report.read_metrics(path), "case")
                report.final_lines(numbers), report.case_log(numbers), report.result_lines(numbers["verification"])
            except ReportError as error:
                refusals += 1
                assert "\n" not in str(error) and str(error).startswith((str(path), "the run", "metrics.jsonl"))
    assert refusals > 5


def test_deep_and_endless_json_is_one_line(run_log, tmp_path):
    begin(run_log, versions={"a": 1})
    path = tmp_path / "metrics.jsonl"
    line = path.read_text()
    for value, said in (
        ("[" * 100_000, "damaged"),
        ("[" * 40 + "]" * 40, "more than 20 levels"),
        ("9" * 10_000, "damaged|no end line"),
    ):
        path.write_text(line.replace('{"a": 1}', '{"a": ' + value + "}"))
        refused(tmp_path, said)


def test_nothing_from_the_metrics_is_markup_in_the_page(run_log, tmp_path):
    evil = "<script>alert(1)</script>\"'&$\\frac{"
    begin(
        run_log,
        network="x",
        case="x",
        command=evil,
        commit=evil,
        device={"machine": evil, evil: evil},
        fast_paths={evil: evil},
    )
    step(run_log, 1)
    verified(run_log, 1, evil, 0.5, tar_at_far_why_not={evil: evil}, tar_at_far={"0.1": 0.3})
    finish(run_log, evil)
    lines = report.read_metrics(tmp_path / "metrics.jsonl")
    lines[0]["config"][evil] = {evil: [evil]}
    text = report.page.render(*report.summarise(lines), tmp_path / "contact_sheet.png")
    assert "<script" not in text and text.count("&lt;script&gt;") > 8


def test_the_report_has_images_and_classes(run_log, tmp_path):
    begin(run_log, images=1600, num_classes=40)
    step(run_log, 1)
    finish(run_log)
    command.main([str(tmp_path)])
    numbers, page = texts(tmp_path)
    assert (numbers["images"], numbers["classes"]) == (1600, 40) and "1,600 images, 40 classes" in page


def test_a_line_without_its_values_is_an_error(run_log, tmp_path):
    begin(run_log)
    run_log.record("step", step=1)
    refused(tmp_path, "line 2: the step line lacks loss")


def test_a_stopped_run_gets_its_page_but_no_success(run_log, tmp_path, capsys):
    begin(run_log)
    step(run_log, 10)
    finish(run_log, "signal")
    refused(tmp_path, r"the run was stopped \(signal\)")
    assert "Final" not in capsys.readouterr().out
    numbers, page = texts(tmp_path)
    assert numbers["complete"] is False and "stopped before its end (signal)" in page


def test_a_case_that_would_leave_the_folder_is_an_error(run_log, tmp_path):
    whole_run(run_log)
    with pytest.raises(ReportError, match="cannot name a file"):
        command.main([str(tmp_path), "--case", "../elsewhere"])
    assert not list(tmp_path.glob("report.*"))


def test_the_command_ends_with_one_line_and_status_1(root, tmp_path):
    done = subprocess.run([sys.executable, "report.py", str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: .*metrics\.jsonl cannot be read.*\n", done.stderr)


def test_a_resumed_run_with_nothing_left_to_do_leaves_the_report_as_it_was(run_log, tmp_path):
    whole_run(run_log)
    before = report.write_report(tmp_path, tmp_path)
    run_log.config = {**CONFIG, "resume": "newest"}
    begin(run_log)
    finish(run_log)
    assert report.write_report(tmp_path, tmp_path) == before
