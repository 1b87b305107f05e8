"""What embeds faces: a checkpoint through `recognizer.Recognizer`, or an ONNX file through onnxruntime.

Both have `embed(images | paths) -> unit float32 [N, D]`, `threshold` (squared L2 distance of unit embeddings, or None),
`calibration` (how it was found, or None), `fingerprint` (which weights these are), `channel_order` and `meta`; an ONNX
file may take faces of another `size` than 112.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from deploy.photos import read_photo
from runtime import files
from runtime.errors import ModelError


def load_recognizer(path, device: Optional[str] = None, threads: Optional[int] = None):
    """(the file, the recognizer in it): of an ONNX file, a checkpoint, or a folder of one .onnx file or of checkpoints,
    of which the newest is taken. Raises ModelError or CheckpointError.

    device: `cpu`, `cuda:0`, `npu:0`; the first of npu, cuda, cpu if None. An ONNX file always runs on the CPU.
    threads: of the CPU.
    """
    path = Path(path)
    if path.is_dir():
        exported = sorted(path.glob("*.onnx"))
        if len(exported) > 1:
            raise ModelError(f"{path}: holds {len(exported)} .onnx files: name one of them")
        path = exported[0] if exported else path
    if path.suffix == ".onnx":
        return path, OnnxRecognizer(path, threads)
    import torch  # these load it too, which an ONNX file does without

    from checkpoint import run
    from recognizer import Recognizer
    from runtime.device import parse_device

    path, state = run.read(path)
    device = parse_device(device or "auto")
    if device.kind == "cpu" and threads:
        torch.set_num_threads(threads)
    recognizer = Recognizer.from_state(state, path, device)
    return path, recognizer


def open_session(path, threads: Optional[int] = None):
    """An onnxruntime.InferenceSession on the CPU; ModelError for a missing package or a file that is no ONNX model.

    threads: None takes what OMP_NUM_THREADS says, else every core.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ModelError(f"{path}: ONNX files need onnxruntime: pip install onnxruntime") from None
    if not Path(path).is_file():
        raise ModelError(f"{path}: no such file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    environment = os.environ.get("OMP_NUM_THREADS", "")
    options.intra_op_num_threads = threads or (int(environment) if environment.isdigit() else 0)
    # spinning threads would take the cores from decoding and from the other workers
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(_quicker(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen classes of its own
        raise ModelError(f"{path}: not an ONNX model that onnxruntime can run ({str(error)[:120]})") from None


def _quicker(path):
    """The model's bytes with PRelu written otherwise; its path where that is not needed or cannot be done here."""
    try:
        import onnx

        written = onnx.load(str(path), load_external_data=False)
    except Exception:  # no such package, or no such file: onnxruntime says what is wrong with it
        return str(path)
    inside = all(tensor.data_location != onnx.TensorProto.EXTERNAL for tensor in written.graph.initializer)
    return written.SerializeToString() if inside and without_prelu(written.graph) else str(path)


def without_prelu(graph) -> int:
    """Writes each PRelu(x) of an ONNX graph as Relu(x) - slope * Relu(-x), in place; returns how many there were. The
    same numbers in half the time: onnxruntime has quick kernels for these, in the layout that its convolutions use."""
    from onnx import helper

    nodes = []
    for node in graph.node:
        if node.op_type != "PRelu":
            nodes.append(node)
            continue
        (x, slope), out = node.input, node.output[0]
        up, minus, down, scaled = (f"{out}/{part}" for part in ("up", "minus", "down", "scaled"))
        nodes += [
            helper.make_node("Relu", [x], [up]),
            helper.make_node("Neg", [x], [minus]),
            helper.make_node("Relu", [minus], [down]),
            helper.make_node("Mul", [down, slope], [scaled]),
            helper.make_node("Sub", [up, scaled], [out]),
        ]
    count = (len(nodes) - len(graph.node)) // 4
    del graph.node[:]
    graph.node.extend(nodes)
    return count


class Port(NamedTuple):
    """An input or output of a network; a size that is not fixed is a word."""

    name: str
    shape: list


def described(session, path) -> tuple[list[Port], list[Port], dict]:
    """(inputs, outputs, metadata) of a session. Raises ModelError for names that are no text."""
    try:
        inputs, outputs = (
            [Port(one.name, one.shape) for one in ports] for ports in (session.get_inputs(), session.get_outputs())
        )
        return inputs, outputs, dict(session.get_modelmeta().custom_metadata_map)
    except UnicodeDecodeError:
        raise ModelError(f"{path}: is damaged (a name in it is no text): copy or export it again") from None


class OnnxRecognizer:
    """An exported backbone, [B, 3, S, S] of (pixel - 127.5) / 127.5 -> [B, D]; B may be fixed.

    What the export knew stands in the file's metadata: `fingerprint`, `channel_order`, `calibration`. For a foreign
    file the fingerprint is its checksum, and the order RGB.
    """

    def __init__(self, path, threads: Optional[int] = None):
        self.path = Path(path)
        self.session = open_session(path, threads)
        inputs, outputs, self.meta = described(self.session, path)
        shape = inputs[0].shape if len(inputs) == 1 else []
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or not isinstance(shape[2], int):
            shown = ", ".join(f"{value.name} {value.shape}" for value in inputs[:4])
            raise ModelError(f"{path}: takes {shown}, where one input [batch, 3, side, side] of faces is expected")
        if not outputs or len(outputs[0].shape) != 2:
            shown = ", ".join(f"{value.name} {value.shape}" for value in outputs[:4])
            raise ModelError(f"{path}: gives {shown or 'nothing'}, where [batch, embedding] is expected")
        self.size = shape[2]
        self.batch = shape[0] if isinstance(shape[0], int) else None
        self.at_once = self.batch or 1  # the activations of one face stay in a core's cache, those of eight do not
        self._input = inputs[0].name
        self.channel_order = self.meta.get("channel_order", "rgb")
        self.fingerprint = self.meta.get("fingerprint") or files.file_checksum(path)
        self.calibration = _calibration(self.meta.get("calibration"), path)
        self.threshold = (self.calibration or {}).get("threshold")

    def embed(self, images) -> np.ndarray:
        """Unit embeddings float32 [N, D] of uint8 RGB faces [N, S, S, 3], or of such images' paths.

        A row of nan stays nan: the caller decides what a broken embedding means. Raises ModelError for another size.
        """
        if not isinstance(images, np.ndarray):
            images = np.stack([read_photo(path) for path in images])
        images_BHWC = images
        if images_BHWC.ndim != 4 or images_BHWC.shape[1:] != (self.size, self.size, 3):
            raise ModelError(
                f"{self.path.name} takes aligned faces of {self.size}x{self.size}, not {images_BHWC.shape[1:]}"
            )
        parts = [self._run(images_BHWC[i : i + self.at_once]) for i in range(0, len(images_BHWC), self.at_once)]
        width = self.session.get_outputs()[0].shape[1]
        emb_ND = np.concatenate(parts) if parts else np.zeros((0, width if isinstance(width, int) else 0), np.float32)
        return emb_ND / np.maximum(np.linalg.norm(emb_ND, axis=1, keepdims=True), 1e-12)

    def to_input(self, images_BHWC: np.ndarray) -> dict:
        """What the session takes, of RGB images."""
        if self.channel_order == "bgr":
            images_BHWC = images_BHWC[..., ::-1]
        input_BCHW = np.ascontiguousarray(images_BHWC.transpose(0, 3, 1, 2), np.float32)
        input_BCHW /= 127.5
        input_BCHW -= 1.0
        return {self._input: input_BCHW}

    def _run(self, images_BHWC: np.ndarray) -> np.ndarray:
        count = len(images_BHWC)
        if self.batch and count < self.batch:
            images_BHWC = np.concatenate([images_BHWC, np.repeat(images_BHWC[:1], self.batch - count, axis=0)])
        return self.session.run(None, self.to_input(images_BHWC))[0][:count].astype(np.float32)


def _calibration(text: Optional[str], path) -> Optional[dict]:
    if not text:
        return None
    try:
        record = json.loads(text)
        if math.isfinite(record["threshold"]):
            return record
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ModelError(f"{path}: its calibration is damaged: run tools.calibrate again")
