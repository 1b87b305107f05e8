"""Faces in a photo: boxes, scores and five landmarks, from MTCNN in torch or from an ONNX file, behind one interface.

`open_detector(det_model)` gives an object whose `detect(image_HWC)` returns `Faces`. Without a file it is MTCNN with
the weights of the pip package `mtcnn` (or `facenet-pytorch`); with one the layout is recognised by its outputs: YuNet,
SCRFD (and InsightFace's own RetinaFace, which has the same) or RetinaFace with prior boxes.

Shapes: N faces, P places of a feature map (times anchors), boxes are x1 y1 x2 y2 and landmarks (x, y), in the photo's
pixels; the landmarks' order is alignment.TEMPLATE_52's.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image

from runtime.errors import ConfigError, ModelError

MOST_CANDIDATES = 5000  # a hostile picture must not make the suppression of overlaps quadratic in a million
MOST_SIDE = 1 << 13  # of a photo as a detector takes it
SIZE = 640  # the long side that the ONNX detectors see


class Faces(NamedTuple):
    """What was found, the best first: float32 boxes [N, 4], scores [N] in 0..1, landmarks [N, 5, 2]."""

    boxes_N4: np.ndarray
    scores_N: np.ndarray
    points_N52: np.ndarray

    def __len__(self) -> int:
        return len(self.scores_N)

    def rows(self, index) -> Faces:
        return Faces(*(part[index] for part in (self.boxes_N4, self.scores_N, self.points_N52)))

    def largest(self) -> int:
        """The row of the face with the largest box."""
        width_N, height_N = (self.boxes_N4[:, 2:] - self.boxes_N4[:, :2]).T
        return int((width_N * height_N).argmax())


def open_detector(det_model: Optional[str] = None, threshold: float = 0.6, size: int = 0):
    """The detector of an ONNX file, or MTCNN where `det_model` is empty. Raises ModelError, one line.

    threshold: the least score; size: the long side in pixels to which a photo is reduced, 0 for the detector's own (640
    for an ONNX file, of which faces below a fortieth are missed, 1280 for MTCNN).
    """
    if not det_model:
        from deploy.mtcnn import LONG_SIDE, Mtcnn  # loads torch

        return Mtcnn(threshold, size=size or LONG_SIDE)
    return OnnxDetector(det_model, threshold, size or SIZE)


def check_size(size: int) -> None:
    """Raises ConfigError for what `open_detector` cannot take."""
    if size and not 64 <= size <= 8192:
        raise ConfigError(f"--det_size {size}: from 64 to 8192 pixels, or 0 for the detector's own")


def suppress(boxes_N4: np.ndarray, scores_N: np.ndarray, overlap: float, of_smaller: bool = False) -> np.ndarray:
    """Non-maximum suppression: the rows to keep, best first; `overlap` is the largest intersection over union.

    of_smaller: over the smaller box's area instead of the union.
    """
    order = np.argsort(-scores_N, kind="stable")[:MOST_CANDIDATES]
    area_N = (boxes_N4[:, 2:] - boxes_N4[:, :2]).clip(0).prod(axis=1)
    keep = []
    while len(order):
        best, order = order[0], order[1:]
        keep.append(best)
        corner1 = np.maximum(boxes_N4[best, :2], boxes_N4[order, :2])
        corner2 = np.minimum(boxes_N4[best, 2:], boxes_N4[order, 2:])
        common = (corner2 - corner1).clip(0).prod(axis=1)
        whole = np.minimum(area_N[best], area_N[order]) if of_smaller else area_N[best] + area_N[order] - common
        order = order[common <= overlap * np.maximum(whole, 1e-9)]
    return np.array(keep, dtype=np.int64)


# --- the layouts of ONNX detectors: outputs -> boxes, scores and landmarks in the network's pixels --------------------


def _centers(height: int, width: int, stride: int, anchors: int = 1, offset: float = 0.0) -> np.ndarray:
    y, x = np.mgrid[: -(-height // stride), : -(-width // stride)]
    return np.repeat((np.stack([x, y], -1).reshape(-1, 2) + offset) * stride, anchors, axis=0).astype(np.float32)


def _yunet(outputs: dict, height: int, width: int):
    """ShiqiYu/libfacedetection.train: score sqrt(cls * obj); box centre and log size; landmarks; all in strides."""
    parts = []
    for stride in (8, 16, 32):
        center_P2 = _centers(height, width, stride)
        cls_P, obj_P = (outputs[f"{name}_{stride}"].reshape(-1).clip(0, 1) for name in ("cls", "obj"))
        box_P4 = outputs[f"bbox_{stride}"].reshape(-1, 4)
        middle_P2 = box_P4[:, :2] * stride + center_P2
        half_P2 = np.exp(box_P4[:, 2:].clip(max=20)) * stride / 2
        points_P52 = outputs[f"kps_{stride}"].reshape(-1, 5, 2) * stride + center_P2[:, None]
        parts.append(
            (np.concatenate([middle_P2 - half_P2, middle_P2 + half_P2], 1), np.sqrt(cls_P * obj_P), points_P52)
        )
    return [np.concatenate(part) for part in zip(*parts)]


def _scrfd(outputs: dict, height: int, width: int):
    """InsightFace's SCRFD: for strides 8 16 32 (or five) scores, then distances to the box's sides, then landmarks."""
    values = list(outputs.values())
    levels = len(values) // 3
    strides = (8, 16, 32) if levels == 3 else (8, 16, 32, 64, 128)
    anchors = 2 if levels == 3 else 1
    parts = []
    for level, stride in enumerate(strides):
        center_P2 = _centers(height, width, stride, anchors)
        side_P4 = values[levels + level].reshape(-1, 4) * stride
        points_P52 = values[2 * levels + level].reshape(-1, 5, 2) * stride + center_P2[:, None]
        box_P4 = np.concatenate([center_P2 - side_P4[:, :2], center_P2 + side_P4[:, 2:]], 1)
        parts.append((box_P4, values[level].reshape(-1), points_P52))
    return [np.concatenate(part) for part in zip(*parts)]


def _retinaface(outputs: dict, height: int, width: int):
    """RetinaFace with prior boxes (arXiv 1905.00641, as most PyTorch ports export it): boxes, scores, landmarks."""
    by_width = {value.shape[-1]: value.reshape(-1, value.shape[-1]) for value in outputs.values()}
    box_P4, score_P2, points_P10 = by_width[4], by_width[2], by_width[10]
    priors = []
    for stride, sizes in ((8, (16, 32)), (16, (64, 128)), (32, (256, 512))):
        middle_P2 = _centers(height, width, stride, anchors=2, offset=0.5)
        side_P1 = np.tile(np.float32(sizes), len(middle_P2) // 2)[:, None]
        priors.append(np.concatenate([middle_P2, side_P1, side_P1], 1))
    prior_P4 = np.concatenate(priors)
    middle_P2 = prior_P4[:, :2] + box_P4[:, :2] * 0.1 * prior_P4[:, 2:]
    half_P2 = prior_P4[:, 2:] * np.exp((box_P4[:, 2:] * 0.2).clip(max=20)) / 2
    points_P52 = prior_P4[:, None, :2] + points_P10.reshape(-1, 5, 2) * 0.1 * prior_P4[:, None, 2:]
    if score_P2.min() < 0 or score_P2.max() > 1:  # exported without its softmax
        score_P2 = np.exp(score_P2 - score_P2.max(axis=1, keepdims=True))
        score_P2 /= score_P2.sum(axis=1, keepdims=True)
    return np.concatenate([middle_P2 - half_P2, middle_P2 + half_P2], 1), score_P2[:, 1], points_P52


class Layout(NamedTuple):
    """decode: as above; bgr, mean, std: what the network takes, (pixel - mean) / std."""

    decode: object
    bgr: bool
    mean: tuple
    std: float


LAYOUTS = {
    "yunet": Layout(_yunet, True, (0, 0, 0), 1.0),
    "scrfd": Layout(_scrfd, False, (127.5, 127.5, 127.5), 128.0),
    "retinaface": Layout(_retinaface, True, (104, 117, 123), 1.0),
}


def recognise_layout(names: list, shapes: list) -> Optional[str]:
    """Which of LAYOUTS a network with these outputs has; None for another."""
    if {f"{part}_{stride}" for part in ("cls", "obj", "bbox", "kps") for stride in (8, 16, 32)} <= set(names):
        return "yunet"
    widths = [shape[-1] if shape else None for shape in shapes]
    if len(widths) in (9, 15):
        third = len(widths) // 3
        if widths == [1] * third + [4] * third + [10] * third:
            return "scrfd"
    if sorted(w for w in widths if isinstance(w, int)) == [2, 4, 10] and len(widths) == 3:
        return "retinaface"
    return None


class OnnxDetector:
    """A detector in an ONNX file, run by onnxruntime on the CPU."""

    def __init__(self, path, threshold: float = 0.6, size: int = SIZE):
        from deploy.backends import described, open_session

        self.threshold, self.path = threshold, Path(path)
        self.session = open_session(path)
        inputs, outputs, _meta = described(self.session, path)
        self._names = [output.name for output in outputs]
        layout = recognise_layout(self._names, [output.shape for output in outputs])
        if layout is None:
            shown = ", ".join(f"{output.name} {output.shape}" for output in outputs[:12])
            raise ModelError(
                f"{path}: no detector with landmarks that is known: its outputs are {shown}; "
                f"known are {', '.join(LAYOUTS)}"
            )
        self.name, self.layout = layout, LAYOUTS[layout]
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            shown = ", ".join(f"{value.name} {value.shape}" for value in inputs[:4])
            raise ModelError(f"{path}: takes {shown}, where one input [1, 3, height, width] of a photo is expected")
        self._input = inputs[0].name
        height, width = inputs[0].shape[2:]
        self._fixed = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        if self._fixed and not all(1 <= side <= MOST_SIDE for side in self._fixed):
            raise ModelError(f"{path}: takes photos of {height} x {width} pixels: known are up to {MOST_SIDE} a side")
        self.size = size

    def detect(self, image_HWC: np.ndarray) -> Faces:
        """The faces of a uint8 RGB photo [H, W, 3]."""
        height, width = image_HWC.shape[:2]
        if self._fixed:
            scale = min(self._fixed[0] / height, self._fixed[1] / width)
            into = self._fixed
        else:
            scale = min(1.0, self.size / max(height, width))
            # the coarsest feature map has a place for 32 pixels
            into = tuple(-(-max(round(side * scale), 1) // 32) * 32 for side in (height, width))
        new = max(round(height * scale), 1), max(round(width * scale), 1)
        reduced = image_HWC
        if new != (height, width):
            # BILINEAR of Pillow averages over all pixels when it reduces
            reduced = np.asarray(Image.fromarray(image_HWC).resize(new[::-1], Image.BILINEAR))
        input_HWC = np.empty((*into, 3), np.float32)
        input_HWC[...] = self.layout.mean
        input_HWC[: new[0], : new[1]] = reduced[:, :, ::-1] if self.layout.bgr else reduced
        input_HWC = (input_HWC - np.float32(self.layout.mean)) / self.layout.std
        feed = {self._input: np.ascontiguousarray(input_HWC.transpose(2, 0, 1))[None]}
        try:
            outputs = dict(zip(self._names, self.session.run(None, feed)))
            boxes_P4, scores_P, points_P52 = self.layout.decode(outputs, *into)
            good = np.flatnonzero(
                (scores_P >= self.threshold) & np.isfinite(boxes_P4).all(1) & np.isfinite(points_P52).all((1, 2))
            )
        except Exception as error:  # onnxruntime has a dozen classes; numpy refuses outputs of other lengths
            raise ModelError(f"{self.path}: fails as {self.name} ({error}): take another detector") from error
        found = Faces(boxes_P4[good], scores_P[good], points_P52[good])
        found = found.rows(suppress(found.boxes_N4, found.scores_N, overlap=0.45))
        back_2 = np.float32([width / new[1], height / new[0]])
        boxes_N4 = (found.boxes_N4.reshape(-1, 2, 2) * back_2).clip(0, (width, height)).reshape(-1, 4)
        return Faces(
            boxes_N4.astype(np.float32),
            found.scores_N.astype(np.float32),
            (found.points_N52 * back_2).astype(np.float32),
        )
