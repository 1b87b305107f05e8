"""Exported files: dynamic batch, metadata, the checkpoint's own embeddings; or nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_set import jpeg

import export as command
from checkpoint.store import save_pth
from deploy import onnx as exporting
from recognizer import Recognizer
from runtime.errors import ConfigError, DataError, ModelError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(jpeg(number, 0))
    return folder


def make(normalisation="(x / 255 - 0.5) / 0.5", channel_order="rgb", threshold=1.25):
    torch.manual_seed(0)
    made = Recognizer.create(
        "mobilefacenet", embedding_size=16, device="cpu", channel_order=channel_order, normalisation=normalisation
    )
    made.threshold, made.as_quickest = threshold, False  # what is compared with it is exact
    with torch.no_grad():  # as trained ones, batch norms that move their input
        for module in made.backbone.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return made


def options(path, kind, output, images=""):
    return Namespace(
        pth_path=str(path), export_type=kind, output=str(output), images=str(images), weights_channel_order=None
    )


@pytest.mark.parametrize("normalisation", ["(x / 255 - 0.5) / 0.5", "(x - 127.5) / 128"])
@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_onnx_is_the_checkpoint(tmp_path, faces, normalisation, channel_order):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from deploy.backends import OnnxRecognizer

    made = make(normalisation, channel_order)
    made.save(tmp_path / "model.pth")
    path = command.export(options(tmp_path / "model.pth", "onnx", tmp_path / "model.onnx", faces))
    read = OnnxRecognizer(path)
    images = command.read_images(str(faces))
    for count in (1, 2, 3):
        assert np.allclose(read.embed(images[:count]), made.embed(images[:count]), atol=1e-5)
    assert read.batch is None and read.size == 112
    meta = read.meta
    assert (meta["input_size"], meta["normalisation"]) == ("3,112,112", "(pixel - 127.5) / 127.5")
    assert (meta["channel_order"], meta["embedding_size"], meta["upstream"]) == (channel_order, "16", "this project")
    assert float(meta["threshold"]) == 1.25 and read.threshold == 1.25 and read.fingerprint == made.fingerprint
    import onnx

    assert onnx.load(path).opset_import[0].version >= 17
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.pth"]


def test_torchscript_and_pth(tmp_path, faces):
    made = make(channel_order="bgr")
    made.save(tmp_path / "model.pth")
    images = command.read_images(str(faces))
    path = command.export(options(tmp_path / "model.pth", "torchscript", tmp_path / "model.pt"))
    extra = {"recognizer.json": ""}
    script = torch.jit.load(str(path), _extra_files=extra)
    assert json.loads(extra["recognizer.json"])["channel_order"] == "bgr"
    input_BCHW = torch.from_numpy(images[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert np.allclose(script(input_BCHW).detach().numpy(), made.embed(images), atol=1e-5)
    path = command.export(options(tmp_path / "model.pth", "pth", tmp_path / "out" / "only.pth"))
    assert np.allclose(Recognizer.load(path, "cpu", opt_level="O0").embed(images), made.embed(images), atol=1e-6)


def test_upstream_weights(tmp_path):
    torch.manual_seed(0)
    import model

    save_pth(tmp_path / "backbone.pth", model.create_model("mbf", embedding_size=16).state_dict())
    path = command.export(options(tmp_path / "backbone.pth", "torchscript", tmp_path / "model.pt"))
    extra = {"recognizer.json": ""}
    torch.jit.load(str(path), _extra_files=extra)
    assert json.loads(extra["recognizer.json"])["upstream"] == "arcface_torch"


def test_what_disagrees_is_not_left(tmp_path, monkeypatch):
    made = make()
    (tmp_path / "model.pt").write_text("what was there before")
    monkeypatch.setattr(exporting._Exported, "forward", lambda self, x: self.net(x).flip(1))
    with pytest.raises(ModelError, match="not exported: the file's embeddings are .* from the checkpoint's"):
        exporting.export(made, tmp_path / "model.pt", "torchscript")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_text() == "what was there before"


def test_wrong_words_and_files(tmp_path, faces):
    make().save(tmp_path / "model.pth")
    with pytest.raises(ConfigError, match="choose from onnx, torchscript, pth"):
        command.export(options(tmp_path / "model.pth", "paddle", tmp_path / "x"))
    with pytest.raises(ModelError, match="is no file"):
        command.export(options(tmp_path / "model.pth", "pth", tmp_path))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="a.jpg"):
        command.export(options(tmp_path / "model.pth", "pth", tmp_path / "x.pth", tmp_path / "bad"))
    words = [sys.executable, str(ROOT / "export.py"), "--pth_path", str(tmp_path / "none.pth")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
