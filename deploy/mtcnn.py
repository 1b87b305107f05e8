"""MTCNN (arXiv 1604.02878) in torch: three small nets, each looking closer at what the one before let through.

The weights come with a pip package, so nothing is downloaded: `mtcnn`, or `facenet-pytorch` (installed without its
pins of old versions: pip install --no-deps facenet-pytorch). Only their weights are used, no code of theirs runs.

Shapes: N candidates; boxes are x1 y1 x2 y2 in the photo's pixels.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from deploy.detection import MOST_CANDIDATES, Faces, suppress
from runtime.errors import ModelError

SMALLEST_FACE = 20  # pixels; the first net sees windows of 12
LONG_SIDE = 1280  # larger photos are reduced to it: a face of 20 pixels in it is the least that can be aligned
THRESHOLDS = (0.6, 0.7)  # of the first two nets; the last one's is the caller's
PACKAGES = {"mtcnn": "assets/weights", "facenet_pytorch": "data"}


def _stage(channels, kernels, pools) -> OrderedDict:
    """conv - prelu - max-pool, as often as there are channels; pools: kernel sizes, 0 for none."""
    parts, before = OrderedDict(), 3
    for number, (width, kernel, pool) in enumerate(zip(channels, kernels, pools), start=1):
        parts[f"conv{number}"] = nn.Conv2d(before, width, kernel)
        parts[f"prelu{number}"] = nn.PReLU(width)
        if pool:
            parts[f"pool{number}"] = nn.MaxPool2d(pool, 2, ceil_mode=True)
        before = width
    return parts


class Proposal(nn.Module):
    """[N, 3, H, W] -> face or not [N, 2, h, w] and box correction [N, 4, h, w], one place for two pixels."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(_stage((10, 16, 32), (3, 3, 3), (2, 0, 0)))
        self.score, self.box = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x):
        x = self.body(x)
        return self.score(x).softmax(1), self.box(x)


class Refine(nn.Module):
    """[N, 3, 24, 24] (or 48) -> face or not [N, 2], box correction [N, 4], landmarks [N, 10] from the last net."""

    def __init__(self, channels, kernels, pools, features, hidden, landmarks: bool):
        super().__init__()
        self.body = nn.Sequential(_stage(channels, kernels, pools))
        self.dense, self.prelu = nn.Linear(features, hidden), nn.PReLU(hidden)
        self.score, self.box = nn.Linear(hidden, 2), nn.Linear(hidden, 4)
        self.points = nn.Linear(hidden, 10) if landmarks else None

    def forward(self, x):
        # the weights expect features in the order width, height, channels
        x = self.body(x).permute(0, 3, 2, 1).flatten(1)
        x = self.prelu(self.dense(x))
        return self.score(x).softmax(1), self.box(x), self.points(x) if self.points else None


def _build():
    return {
        "pnet": Proposal(),
        "rnet": Refine((28, 48, 64), (3, 3, 2), (3, 3, 0), 576, 128, landmarks=False),
        "onet": Refine((32, 64, 64, 128), (3, 3, 3, 2), (3, 3, 2, 0), 1152, 256, landmarks=True),
    }


class Mtcnn:
    """The three nets; `detect` as in deploy.detection."""

    name = "mtcnn"

    def __init__(self, threshold: float = 0.7, device: Optional[torch.device] = None, size: int = LONG_SIDE):
        self.threshold, self.device, self.size = threshold, device or torch.device("cpu"), size
        self.nets = _build()
        load = _find_weights()
        for name, net in self.nets.items():
            load(name, net)
            net.eval().to(self.device)

    def detect(self, image_HWC: np.ndarray) -> Faces:
        """The faces of a uint8 RGB photo [H, W, 3]."""
        height, width = image_HWC.shape[:2]
        scale = self.size / max(height, width)
        if scale < 1:  # in bytes: as floats a phone's largest photo would take gigabytes
            size = [max(round(side * scale), 1) for side in (width, height)]
            image_HWC = np.array(Image.fromarray(image_HWC).resize(size, Image.BOX))
        with torch.no_grad():
            x = torch.tensor(image_HWC, device=self.device).permute(2, 0, 1)[None].float()
            x = (x - 127.5) / 128
            boxes_N4, scores_N = self._propose(x)
            boxes_N4, scores_N, _ = self._refine(x, boxes_N4, "rnet", 24, THRESHOLDS[1])
            boxes_N4, scores_N, points_N52 = self._refine(x, boxes_N4, "onet", 48, self.threshold)
        back_2 = np.float32([width / x.shape[3], height / x.shape[2]])
        boxes_N4 = (boxes_N4.reshape(-1, 2, 2) * back_2).clip(0, (width, height)).reshape(-1, 4)
        return Faces(boxes_N4.astype(np.float32), scores_N.astype(np.float32), points_N52 * back_2)

    def _propose(self, x):
        """Windows of every size that the first net takes for faces."""
        height, width = x.shape[2:]
        boxes, scores = [np.zeros((0, 4), np.float32)], [np.zeros(0, np.float32)]
        scale = 12 / SMALLEST_FACE
        while min(height, width) * scale >= 12:
            size = [int(np.ceil(side * scale)) for side in (height, width)]
            score_12hw, box_14hw = self.nets["pnet"](F.interpolate(x, size=size, mode="area"))
            score_hw = score_12hw[0, 1]
            row, column = torch.nonzero(score_hw > THRESHOLDS[0], as_tuple=True)
            if len(row):
                corner_N2 = torch.stack([column, row], 1).float().cpu().numpy() * 2
                window_N4 = np.concatenate([corner_N2 + 1, corner_N2 + 12], 1) / scale
                score_N = score_hw[row, column].cpu().numpy()
                box_N4 = _correct(window_N4, box_14hw[0, :, row, column].T.cpu().numpy())
                # neighbours in the window grid first, so that the pyramid's union stays small
                keep = suppress(window_N4, score_N, 0.5)
                boxes.append(box_N4[keep])
                scores.append(score_N[keep])
            scale *= 0.709  # half the area, as the paper has it
        boxes_N4, scores_N = np.concatenate(boxes), np.concatenate(scores)
        keep = suppress(boxes_N4, scores_N, 0.7)
        return boxes_N4[keep], scores_N[keep]

    def _refine(self, x, boxes_N4, name: str, size: int, threshold: float):
        """The candidates that the net lets through, with its corrected boxes and, from the last net, landmarks."""
        boxes_N4 = _square(boxes_N4)[:MOST_CANDIDATES]
        parts = [self._crops(x, boxes_N4[i : i + 256], size) for i in range(0, len(boxes_N4), 256)]
        outputs = [self.nets[name](part) for part in parts]
        if not outputs:
            return boxes_N4, np.zeros(0, np.float32), np.zeros((0, 5, 2), np.float32)
        score_N = torch.cat([score[:, 1] for score, _, _ in outputs]).cpu().numpy()
        shift_N4 = torch.cat([box for _, box, _ in outputs]).cpu().numpy()
        good = score_N > threshold
        boxes_N4, score_N, shift_N4 = boxes_N4[good], score_N[good], shift_N4[good]
        points_N52 = np.zeros((len(boxes_N4), 5, 2), np.float32)
        if outputs[0][2] is not None:
            # five x, then five y, as shares of the box
            points_N52 = torch.cat([points for _, _, points in outputs]).cpu().numpy()[good]
            points_N52 = points_N52.reshape(-1, 2, 5).transpose(0, 2, 1)
            side_N12 = (boxes_N4[:, 2:] - boxes_N4[:, :2] + 1)[:, None]
            points_N52 = boxes_N4[:, None, :2] + points_N52 * side_N12
        boxes_N4 = _correct(boxes_N4, shift_N4)
        keep = suppress(boxes_N4, score_N, 0.7, of_smaller=name == "onet")
        return boxes_N4[keep], score_N[keep], points_N52[keep].astype(np.float32)

    def _crops(self, x, boxes_N4, size: int):
        """Square windows of the photo [N, 3, size, size]; what lies outside of it is grey."""
        height, width = x.shape[2:]
        crops = []
        for x1, y1, x2, y2 in np.trunc(boxes_N4).astype(int):
            inside = x[:, :, max(y1, 0) : max(min(y2 + 1, height), 0), max(x1, 0) : max(min(x2 + 1, width), 0)]
            if 0 in inside.shape:
                inside = x.new_zeros(1, 3, 1, 1)
            else:
                inside = F.pad(inside, (max(-x1, 0), max(x2 + 1 - width, 0), max(-y1, 0), max(y2 + 1 - height, 0)))
            crops.append(F.interpolate(inside, size=(size, size), mode="area"))
        return torch.cat(crops)


def _correct(boxes_N4, shift_N4):
    """Moves each side by a share of the box's own size."""
    side_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2] + 1
    return boxes_N4 + np.tile(side_N2, 2) * shift_N4


def _square(boxes_N4):
    middle_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2
    half_N1 = (boxes_N4[:, 2:] - boxes_N4[:, :2]).max(axis=1, keepdims=True) / 2
    return np.concatenate([middle_N2 - half_N1, middle_N2 + half_N1], 1)


# --- weights ----------------------------------------------------------------------------------------------------------


def _find_weights():
    for package, folder in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            place = Path(spec.submodule_search_locations[0], folder)
            if package == "facenet_pytorch" and (place / "onet.pt").is_file():
                return lambda name, net: _from_torch(place / f"{name}.pt", net)
            if package == "mtcnn" and (place / "onet.lz4").is_file():
                return lambda name, net: _from_keras(place / f"{name}.lz4", net)
    raise ModelError(
        "finding faces needs a detector: pip install mtcnn (its weights are used, TensorFlow is not), "
        "or name an ONNX one by --det_model"
    )


def _our_names(net, suffixes) -> list:
    """Our parameters' names in the packages' order: the body's layers, then the outputs by `suffixes`."""
    body = [name for name, _ in net.named_parameters() if name.startswith(("body", "dense", "prelu"))]
    return body + [f"{output}.{kind}" for output in suffixes for kind in ("weight", "bias")]


def _from_torch(path, net) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)
    outputs = ("score", "box", "points") if getattr(net, "points", None) else ("score", "box")
    net.load_state_dict(dict(zip(_our_names(net, outputs), state.values())))


def _from_keras(path, net) -> None:
    try:
        import joblib  # comes with the package, and so do the files that it unpickles: as trusted as its code
    except ImportError:
        raise ModelError("the weights in package mtcnn need joblib and lz4: pip install joblib lz4") from None
    arrays = [torch.from_numpy(np.asarray(array)) for array in joblib.load(path)]
    outputs = ("box", "points", "score") if getattr(net, "points", None) else ("box", "score")
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    state = {}
    for name, array in zip(_our_names(net, outputs), arrays):
        if array.ndim == 4:  # height, width, in, out
            array = array.permute(3, 2, 0, 1)
        elif array.ndim == 2:
            array = array.T
        state[name] = array.reshape(shapes[name]).contiguous()
    net.load_state_dict(state)
