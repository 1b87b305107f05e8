"""arcface_paddle's commands: options as words, its rate and lines, and the scripts by sh."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_set import make_tiny_set

from data import convert
from plsc import arcface_paddle as command
from runtime.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


def test_options_are_the_configs_then_the_command_lines():
    given = command.parse(
        ["--config_file", "configs/ms1mv3_r50.py", "--fp16", "False", "--is_static", "yes", "--lr=0.2"]
    )
    assert (given.backbone, given.batch_size, given.train_unit, given.train_num) == ("FresResNet50", 128, "epoch", 25)
    assert (given.fp16, given.is_static, given.is_bin) == (False, False, True)  # yes is no word for True there
    config = command.as_config(given, 8)
    assert (config.batch_size, config.lr, config.sample_rate, config.update_rows) == (1024, 0.4, 0.1, "all")
    assert (config.net_mode, config.net_depth, config.decay_norms, config.use_amp) == ("resnet", 50, True, False)
    plain = command.parse([])
    assert (plain.backbone, plain.warmup_num, plain.decay_boundaries) == (
        "FresResNet100",
        1000,
        (100000, 140000, 160000),
    )
    assert command.parse(["--val_targets", "lfw,cfp_fp"]).val_targets == ("lfw", "cfp_fp")
    face = command.as_config(command.parse(["--loss", "SphereFace", "--backbone=MobileFaceNet_128"]), 1)
    assert (face.loss_type, face.combined_margin, face.net_mode) == ("combined", (1.35, 0.0, 0.0), "mobilefacenet")


@pytest.mark.parametrize(
    "words,says",
    [
        (["--config_file=configs/mine.py"], "choose from configs/config.py"),
        (["--loss=Triplet"], "choose from ArcFace"),
        (["--backbone=VGG"], "choose from FresResNet50"),
        (["--train_unit=day"], "choose from step, epoch"),
        (["--sample_ratio=2"], "--sample_rate"),
    ],
)
def test_wrong_values_are_one_line(words, says):
    with pytest.raises(ConfigError, match=says):
        command.as_config(command.parse(words), 1)


def test_a_training_set_that_is_not_there_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="MS1M_v3: no such folder: give the training set's as --data_dir"):
        command.train(command.parse([]))
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What train.py leaves of two small epochs, on image files as seed 002 lays them out."""
    folder = tmp_path_factory.mktemp("arcface")
    make_tiny_set(folder / "rec")
    convert.recordio_to_list(folder / "rec/train.rec", folder / "MS1M_v3", 1)
    convert.copy_pair_sets(folder / "rec", folder / "MS1M_v3")
    words = [
        "--config_file", "configs/ms1mv3_mobileface.py", "--is_static", "False", "--data_dir", "MS1M_v3",
        "--num_classes", "4", "--batch_size", "4", "--train_num", "2", "--decay_boundaries", "1", "--sample_ratio",
        "1.0", "--val_targets", "lfw", "--log_interval_step", "2", "--output", "out", "--num_workers", "0",
        "--embedding_size", "16",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/train.py"), *words], cwd=folder, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_training_leaves_its_log_and_folders(trained):
    log = (trained / "out/training.log").read_text()
    line = r"Training: \S+ \S+ - loss \d+\.\d{4}, lr: \d\.\d{6}, epoch: 0, step: 2, eta: \d+\.\d\d hours, "
    line += r"throughput: \d+\.\d\d imgs/sec"
    assert re.search(line, log)
    assert "lr: 0.000781, epoch: 0, step: 4," in log and "lr: 0.000078, epoch: 1, step: 6," in log  # 0.1 * 4 / 512
    assert re.search(
        r"\[lfw\]\[5\]XNorm: \d+\.\d+\n.*\[lfw\]\[5\]Accuracy-Flip: \d\.\d{5}\+-\d\.\d{5}\n.*Accuracy-Highest", log
    )
    assert "total_batch_size: 4" in log and "world_size: 1" in log and "Save model to " in log
    folder = trained / "out/MobileFaceNet_128"
    assert [path.name for path in folder.iterdir() if path.is_dir() and path.name.isdigit()] == ["1"]  # 1 is kept
    assert json.loads((folder / "1/meta.json").read_text())["num_classes"] == 4


def test_validation_export_and_inference(trained, monkeypatch, capsys, caplog):
    def run(tool, *words):
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, words)])
        importlib.import_module(f"tools.{tool}").main()
        return capsys.readouterr().out

    monkeypatch.chdir(trained)
    caplog.set_level(logging.INFO)
    checkpoint = trained / "out/MobileFaceNet_128/1"
    run("validation", "--checkpoint_dir", checkpoint, "--data_dir", "MS1M_v3", "--val_targets", "lfw,cfp_fp")
    assert "has no verification set cfp_fp" in caplog.text
    log = (trained / "out/training.log").read_text()
    last = re.findall(r"Accuracy-Flip: (\S+)", log)[-1]
    assert f"[lfw][1]Accuracy-Flip: {last}" in caplog.text
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    words = ("--checkpoint_dir", checkpoint, "--output_dir", "exported", "--backbone", "MobileFaceNet_128")
    assert "Save exported model to 'exported'." in run("export", "--export_type", "onnx", *words)
    shown = run("inference", "--onnx_file", "exported/MobileFaceNet_128.onnx", "--image_path", "MS1M_v3/images")
    assert "onnx inference result:  (20, 16)" in shown
    emb_ND = np.load(trained / "embeddings.npy")
    assert emb_ND.shape == (20, 16) and np.linalg.norm(emb_ND, axis=1) == pytest.approx(1, abs=1e-5)
    assert f"similarity {emb_ND[0] @ emb_ND[1]:.4f}  00000001.jpg  00000002.jpg" in shown
    with pytest.raises(ConfigError, match="use --export_type onnx"):
        run("export", "--export_type", "paddle", *words)


def test_speeds_out_of_logs(tmp_path):
    sys.path.insert(0, str(ROOT))
    from tools.extract_perf_logs import extract

    for gpus, speed in (("1n1g", 100.0), ("1n8g", 700.0)):
        run_folder = tmp_path / f"arcface_paddle_r50_static_fp16_r0.1_bz128_{gpus}_id1"
        run_folder.mkdir()
        lines = [f"loss 1.0, throughput: {speed + number:.2f} imgs/sec" for number in range(5)]
        (run_folder / "workerlog.0").write_text("\n".join(lines))
    found = extract(tmp_path, 1, 4)["static"]["r50"]["1n8g"]["fp16"]["bz128"]
    assert found == {"average_speed": 702.0, "median_speed": 702.0, "speedup": 702.0 / 102.0}
    with pytest.raises(DataError, match="holds no"):
        extract(tmp_path / "nothing", 1, 4)


SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*_static.sh")) + ["inference.sh"]
SCRIPTS += [name.replace("static", "dynamic") for name in SCRIPTS if "static" in name]


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_in_any_shell(script, shell, tmp_path):
    """A stand-in for Python shows that each script comes to its command, from any folder."""
    (tmp_path / "python").write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        [shell, str(ROOT / "scripts" / script), "--sample_ratio", "1.0"],
        cwd=tmp_path, env={**os.environ, "PYTHON": str(tmp_path / "python")}, capture_output=True, text=True,
    )  # fmt: skip
    words = done.stdout.split("\n")
    assert done.returncode == 0 and words[-3:-1] == ["--sample_ratio", "1.0"], done.stderr
    tool = next(word for word in words if word.startswith("tools/"))
    assert (ROOT / tool).is_file() and (script.split("_")[0].split(".")[0] in tool)
    if "--is_static" in words:
        assert words[words.index("--is_static") + 1] == str("static" in script)
    if tool == "tools/train.py":
        command.as_config(command.parse(words[words.index(tool) + 1 : -1]), 8)
