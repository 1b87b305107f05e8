"""A recognizer as a file for other programs: ONNX, TorchScript, or a plain `.pth`; checked before it has its name.

Every file takes float32 [B, 3, 112, 112], (pixel - 127.5) / 127.5, B free, and gives the network's own embeddings
[B, D]; what else was known stands in its metadata. Shapes: B, N images, D embedding.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from runtime import files
from runtime.errors import ConfigError, ModelError
from runtime.log import one_line, versions

TYPES = {"onnx": ".onnx", "torchscript": ".pt", "pth": ".pth"}
OPSETS = (20, 18, 17, 13)  # the newest that this torch's exporter writes
TOLERANCE = 1e-4  # cosine distance to the checkpoint's embeddings
METADATA = "recognizer.json"  # in a TorchScript file


class _Exported(nn.Module):
    """The backbone over (pixel - 127.5) / 127.5, whatever it was trained with."""

    def __init__(self, recognizer):
        super().__init__()
        self.net, self.factor = recognizer.backbone, recognizer.input_factor

    def forward(self, images_BCHW):
        return self.net(images_BCHW if self.factor == 1.0 else images_BCHW * self.factor)


def export(recognizer, path, export_type: str = "onnx", images=None, upstream: str = "") -> Path:
    """Writes `path`; images: uint8 RGB [N, 112, 112, 3] to check it with, beside random ones.

    recognizer: on the CPU, in fp32, in which it embeds from now on. Raises ModelError where the file's embeddings are
    further than TOLERANCE from the checkpoint's, and ConfigError or ModelError where it cannot be made or checked; then
    nothing is left."""
    if export_type not in TYPES:
        raise ConfigError(f"--export_type {export_type}: choose from {', '.join(TYPES)}")
    path = Path(path)
    recognizer.as_quickest = False  # the file is compared with what fp32 gives
    if recognizer.device.kind != "cpu":
        raise ModelError("an export is made on the CPU: load the recognizer with device='cpu'")
    path.parent.mkdir(parents=True, exist_ok=True)
    checked = _images(images)
    with files.atomic_path(path, ModelError, suffix=TYPES[export_type]) as temporary:
        try:
            embed = _WRITERS[export_type](recognizer, temporary, _metadata(recognizer, upstream))
            _compare(recognizer.embed(checked), embed(checked), path)
        finally:
            for left in {*temporary.parent.glob(temporary.stem + "*")} - {temporary}:  # weights put beside it
                left.unlink()
    return path


def _metadata(recognizer, upstream: str) -> dict[str, str]:
    meta = recognizer.meta
    known = {
        "input_size": "3,112,112",
        "normalisation": "(pixel - 127.5) / 127.5",
        "channel_order": recognizer.channel_order,
        "embedding_size": str(meta["embedding_size"]),
        "network": recognizer.name,
        "upstream": upstream or "this project",
        "fingerprint": recognizer.fingerprint,
        "versions": json.dumps(versions()),
    }
    if recognizer.threshold is not None:
        known["threshold"] = repr(float(recognizer.threshold))
        known["calibration"] = json.dumps(meta.get("calibration") or {"threshold": float(recognizer.threshold)})
    return known


def _images(images) -> np.ndarray:
    """Noise, and smooth pictures as a camera's are; and those that were given."""
    source = np.random.RandomState(0)
    noise = source.randint(0, 256, (4, 112, 112, 3))
    coarse = source.randint(0, 256, (4, 8, 8, 3)).repeat(14, 1).repeat(14, 2)
    made = np.concatenate([noise, coarse]).astype(np.uint8)
    return made if images is None else np.concatenate([np.asarray(images, np.uint8), made])


def _compare(expected_ND, found_ND, path) -> None:
    if found_ND.shape != expected_ND.shape or not np.isfinite(found_ND).all():
        raise ModelError(
            f"{path}: not exported: the file gives {found_ND.shape} for {expected_ND.shape}, or no numbers"
        )
    distance = float((1.0 - (expected_ND.astype(np.float64) * found_ND.astype(np.float64)).sum(axis=1)).max())
    if distance > TOLERANCE:
        raise ModelError(
            f"{path}: not exported: the file's embeddings are {distance:.2g} (cosine) from the checkpoint's, "
            f"and {TOLERANCE:g} is allowed"
        )


def _traced(recognizer):
    from verify.embed import evaluating

    module = _Exported(recognizer)
    return evaluating(module), torch.zeros(2, 3, 112, 112)


def _write_onnx(recognizer, path: Path, metadata: dict):
    try:
        import onnx

        from deploy.backends import OnnxRecognizer, without_prelu
    except ImportError:
        raise ModelError("ONNX files need the packages onnx and onnxruntime: pip install onnx onnxruntime") from None
    evaluating, example = _traced(recognizer)
    names = {"input_names": ["image"], "output_names": ["embedding"]}
    axes = {"image": {0: "batch"}, "embedding": {0: "batch"}}
    plain = {"dynamo": False} if "dynamo" in torch.onnx.export.__code__.co_varnames else {}
    with evaluating as module, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        for opset in OPSETS:
            try:
                torch.onnx.export(
                    module, (example,), str(path), opset_version=opset, dynamic_axes=axes, **names, **plain
                )
                break
            except (ValueError, RuntimeError) as error:
                if opset == OPSETS[-1] or "opset" not in str(error).lower():
                    raise ModelError(f"{recognizer.name}: cannot become ONNX ({one_line(error)[:150]})") from error
    written = onnx.load(path)
    without_prelu(written.graph)
    onnx.helper.set_model_props(written, metadata)
    onnx.checker.check_model(written)
    path.write_bytes(written.SerializeToString())
    made = OnnxRecognizer(path)
    return lambda images: np.concatenate([made.embed(images[:1]), made.embed(images[1:])])


def _write_torchscript(recognizer, path: Path, metadata: dict):
    evaluating, example = _traced(recognizer)
    with evaluating as module, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, example, check_trace=False)
        torch.jit.save(traced, str(path), _extra_files={METADATA: json.dumps(metadata)})
        made = torch.jit.load(str(path))
    bgr = recognizer.channel_order == "bgr"

    def embed(images_NHWC):
        images = torch.from_numpy(images_NHWC[..., ::-1].copy() if bgr else images_NHWC)
        images_NCHW = images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        with torch.no_grad():
            emb_ND = torch.cat([made(images_NCHW[:1]), made(images_NCHW[1:])])
        return nn.functional.normalize(emb_ND).numpy()

    return embed


def _write_pth(recognizer, path: Path, metadata: dict):
    return type(recognizer).load(recognizer.save(path), "cpu", opt_level="O0").embed


_WRITERS = {"onnx": _write_onnx, "torchscript": _write_torchscript, "pth": _write_pth}
