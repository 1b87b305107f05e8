"""An int8 file: near the fp32 one, another model by its fingerprint, and not written where it costs accuracy."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_deploy import tiny_onnx

from data import pairs
from deploy import quantise as quantising
from deploy.backends import OnnxRecognizer
from deploy.quantise import quantise
from runtime.errors import ConfigError, DataError, ModelError

for package in ("onnxruntime", "onnx"):
    pytest.importorskip(package)


@pytest.fixture
def faces(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcd":
        colour = rng.integers(0, 256, 3, dtype=np.uint8)
        Image.fromarray(np.full((112, 112, 3), colour)).save(tmp_path / f"{name}.png")
    (tmp_path / "text.jpg").write_text("no face")
    return tmp_path


def test_an_int8_file_embeds_as_its_model_does(faces):
    exact = OnnxRecognizer(tiny_onnx(faces / "model.onnx"))
    assert "of 4 faces" in quantise(faces / "model.onnx", faces / "int8.onnx", faces)
    small = OnnxRecognizer(faces / "int8.onnx")
    images = np.stack([np.asarray(Image.open(faces / f"{name}.png")) for name in "abcd"])
    np.testing.assert_allclose(small.embed(images), exact.embed(images), atol=0.02)
    assert small.fingerprint != exact.fingerprint and small.threshold is None
    assert not np.array_equal(small.embed(images), exact.embed(images))


def test_what_cannot_be_quantised_leaves_nothing(faces, monkeypatch):
    model, out = tiny_onnx(faces / "model.onnx"), faces / "int8.onnx"
    with pytest.raises(ConfigError, match="an .onnx file is expected"):
        quantise(faces / "model.pth", out, faces)
    (faces / "none").mkdir()
    with pytest.raises(DataError, match="holds no aligned face of 112x112"):
        quantise(model, out, faces / "none")
    encoded = [(faces / f"{name}.png").read_bytes() for name in "abcd" for _ in range(5)]
    pairs.write_bin(faces / "set.bin", encoded, [True, False] * 5)
    assert "accuracy on" in quantise(model, out, faces, faces / "set.bin")
    out.unlink()
    monkeypatch.setattr(quantising, "LOSS", -2.0)
    with pytest.raises(ModelError, match="not written: least cosine .* accuracy on"):
        quantise(model, out, faces, faces / "set.bin")
    assert not out.exists()
