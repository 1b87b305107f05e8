"""A detector and a recognizer whose answers a test can foretell, for what stands on them."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.alignment import TEMPLATE_52
from deploy.detection import Faces


class RedFaces:
    """A face of 112 pixels below and right of each pure red pixel."""

    def __init__(self):
        self.seen = 0

    def detect(self, image_HWC) -> Faces:
        self.seen += 1
        row, column = np.nonzero((image_HWC == (255, 0, 0)).all(-1))
        corner = np.stack([column, row], 1).astype(np.float32)
        boxes_N4 = np.concatenate([corner, corner + 112], 1)
        points_N52 = corner[:, None] + TEMPLATE_52.astype(np.float32)
        return Faces(boxes_N4, np.full(len(row), 0.9, np.float32), points_N52)


def tiny_onnx(path, batch="n", size=112):
    """An ONNX recognizer whose embedding is the face's mean colour in -1..1."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["m"]), helper.make_node("Flatten", ["m"], ["y"])]
    x = helper.make_tensor_value_info("x", kind, [batch, 3, size, size])
    y = helper.make_tensor_value_info("y", kind, [batch, 3])
    graph = helper.make_graph(nodes, "tiny", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def picture(*colours) -> np.ndarray:
    """A photo with a face of each colour, side by side, as RedFaces finds them."""
    image = np.zeros((120, 120 * max(len(colours), 1), 3), np.uint8)
    for number, colour in enumerate(colours):
        image[:, 120 * number : 120 * (number + 1)] = colour
        image[3, 120 * number + 2] = (255, 0, 0)
    return image
