"""An ONNX recognizer in int8 by static quantisation: up to three times as fast in onnxruntime (docs/serving.md).

Shapes: N images of S x S.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Optional

import numpy as np

from data.pairs import load_pairs
from deploy.backends import OnnxRecognizer
from deploy.photos import list_photos, read_photo
from runtime import files
from runtime.errors import ConfigError, DamagedItem, DataError, ModelError
from verify.protocol import evaluate_pairs

LOSS = 0.001  # of accuracy, at which a file is not written


def quantise(path, output, images, pairs=None, channel_order: Optional[str] = None, count: int = 100) -> str:
    """Writes the int8 file `output` of the ONNX file `path`, and returns a line that says what it costs.

    images: a folder of aligned faces or a pair set; the ranges of activations are those of its first `count`. pairs: a
    pair set; where the file loses LOSS of accuracy on it or more it is not written, and ModelError says so. Also
    raises ModelError, DataError, ConfigError."""
    if Path(path).suffix != ".onnx":
        raise ConfigError(f"{path}: an .onnx file is expected: python export.py writes one")
    exact = OnnxRecognizer(path)
    images_NSS3 = _faces(images, count, exact.size, channel_order)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "int8.onnx")
        write_int8(path, made, exact, images_NSS3)
        small = OnnxRecognizer(made)
        cosine = float((small.embed(images_NSS3) * exact.embed(images_NSS3)).sum(axis=1).min())
        line = f"least cosine to the fp32 embeddings of {len(images_NSS3)} faces: {cosine:.4f}"
        if pairs:
            faces, issame_N = load_pairs(pairs, channel_order)
            before, after = (evaluate_pairs(one.embed(faces[:]), issame_N).accuracy for one in (exact, small))
            line += f"; accuracy on {pairs}: {before:.4f} in fp32, {after:.4f} in int8"
            if before - after >= LOSS:
                raise ModelError(f"{output}: not written: {line}")
        with files.atomic_file(output) as file:
            file.write(made.read_bytes())
    return line


def _faces(source, count: int, size: int, channel_order: Optional[str]) -> np.ndarray:
    source, faces = Path(source), []
    if source.is_file():
        return load_pairs(source, channel_order)[0][:count]
    for name in list_photos(source):
        try:
            face_HWC = read_photo(source / name)
        except DamagedItem:
            continue
        if face_HWC.shape[:2] == (size, size):
            faces.append(face_HWC)
        if len(faces) == count:
            break
    if not faces:
        raise DataError(f"{source}: holds no aligned face of {size}x{size}: python -m tools.align makes them")
    return np.stack(faces)


def write_int8(path, output, recognizer: OnnxRecognizer, images_NSS3: np.ndarray) -> None:
    """Weights by channel, activations by their ranges on the images."""
    try:
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError:
        raise ModelError("int8 needs the packages onnx and onnxruntime: pip install onnx onnxruntime") from None

    class Faces(quantization.CalibrationDataReader):
        def __init__(self):
            self._inputs = iter([recognizer.to_input(images_NSS3[i : i + 1]) for i in range(len(images_NSS3))])

        def get_next(self):
            return next(self._inputs, None)

    prepared = Path(output).with_suffix(".prepared.onnx")
    try:
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(output),
            Faces(),
            per_channel=True,
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    except Exception as error:  # onnxruntime's and onnx's own, of many kinds
        raise ModelError(f"{path}: cannot be quantised ({str(error)[:120]})") from None
    written = onnx.load(str(output))
    # other embeddings than the fp32 file's: galleries and thresholds of one are not the other's
    meta = {name: value for name, value in recognizer.meta.items() if name not in ("threshold", "calibration")}
    onnx.helper.set_model_props(written, {**meta, "fingerprint": files.file_checksum(output)[:16]})
    onnx.save(written, str(output))
