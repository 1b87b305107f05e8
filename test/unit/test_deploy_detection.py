"""Detectors: the layouts of ONNX files, MTCNN, and both on real photos where these are."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from deploy.detection import LAYOUTS, Faces, _centers, open_detector, recognise_layout, suppress
from runtime.errors import ModelError

BOX = np.array([40.0, 72.0, 104.0, 120.0])
POINTS = np.array([[52.0, 88], [92, 90], [71, 100], [58, 110], [88, 112]])


def test_suppression_keeps_the_best_of_each_heap():
    boxes = np.float32([[0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60], [0, 0, 5, 5]])
    scores = np.float32([0.8, 0.9, 0.7, 0.6])
    assert suppress(boxes, scores, 0.4).tolist() == [1, 2, 3]  # 16 of 100 + 25 - 16 is below 0.4
    assert suppress(boxes, scores, 0.4, of_smaller=True).tolist() == [1, 2]
    assert suppress(boxes[:0], scores[:0], 0.4).tolist() == []


def test_a_thousand_faces_are_no_trouble():
    corner = np.stack(np.meshgrid(np.arange(40), np.arange(40)), -1).reshape(-1, 2) * 20.0
    boxes = np.concatenate([corner, corner + 15], 1)
    assert len(suppress(boxes, np.linspace(1, 0.5, 1600), 0.4)) == 1600


def yunet_outputs(height, width):
    """One face, written down in the network's own terms at stride 8."""
    outputs = {}
    for stride in (8, 16, 32):
        count = (height // stride) * (width // stride)
        for name, columns in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            outputs[f"{name}_{stride}"] = np.zeros((1, count, columns), np.float32)
    place = (height // 8) and 12 * (width // 8) + 9  # row 12, column 9
    middle, side = (BOX[:2] + BOX[2:]) / 2, BOX[2:] - BOX[:2]
    outputs["cls_8"][0, place], outputs["obj_8"][0, place] = 0.81, 1.0
    outputs["bbox_8"][0, place] = [*(middle / 8 - (9, 12)), *np.log(side / 8)]
    outputs["kps_8"][0, place] = (POINTS / 8 - (9, 12)).reshape(-1)
    return outputs, 0.9


def scrfd_outputs(height, width):
    parts = {columns: [] for columns in (1, 4, 10)}
    for stride in (8, 16, 32):
        count = 2 * (height // stride) * (width // stride)
        for columns in parts:
            parts[columns].append(np.zeros((count, columns), np.float32))
    place = 2 * (6 * (width // 16) + 4) + 1  # the second anchor at row 6, column 4 of stride 16
    middle = np.array([64.0, 96.0])
    parts[1][1][place] = 0.9
    parts[4][1][place] = np.concatenate([middle - BOX[:2], BOX[2:] - middle]) / 16
    parts[10][1][place] = ((POINTS - middle) / 16).reshape(-1)
    return {str(i): part for i, part in enumerate(parts[1] + parts[4] + parts[10])}, 0.9


def retinaface_outputs(height, width):
    count = sum(2 * (height // stride) * (width // stride) for stride in (8, 16, 32))
    loc, conf, landms = np.zeros((1, count, 4)), np.zeros((1, count, 2)), np.zeros((1, count, 10))
    conf[..., 0] = 1
    first = 2 * (height // 8) * (width // 8)
    place = first + 2 * (5 * (width // 16) + 4)  # row 5, column 4 of stride 16, the prior of 64 pixels
    prior = np.array([4.5 * 16, 5.5 * 16])
    middle, side = (BOX[:2] + BOX[2:]) / 2, BOX[2:] - BOX[:2]
    loc[0, place] = [*((middle - prior) / 6.4), *(np.log(side / 64) / 0.2)]
    conf[0, place] = [0.1, 0.9]
    landms[0, place] = ((POINTS - prior) / 6.4).reshape(-1)
    return {"boxes": loc, "conf": conf, "landms": landms}, 0.9


OUTPUTS = {"yunet": yunet_outputs, "scrfd": scrfd_outputs, "retinaface": retinaface_outputs}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_and_decoded(name):
    """The numbers of one known face are worked out by hand above, from the layout's own definition."""
    outputs, score = OUTPUTS[name](160, 192)
    assert recognise_layout(list(outputs), [value.shape for value in outputs.values()]) == name
    boxes, scores, points = LAYOUTS[name].decode(outputs, 160, 192)
    best = int(scores.argmax())
    assert scores[best] == pytest.approx(score, abs=1e-6) and (np.delete(scores, best) < 0.11).all()
    np.testing.assert_allclose(boxes[best], BOX, atol=1e-3)
    np.testing.assert_allclose(points[best], POINTS, atol=1e-3)


def test_places_cover_sizes_that_no_stride_divides():
    assert len(_centers(100, 70, 32)) == 4 * 3


def test_what_is_no_detector_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"missing\.onnx: no such file"):
        open_detector(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ModelError, match="not an ONNX model"):
        open_detector(tmp_path / "text.onnx")
    assert recognise_layout(["a"], [(1, 512)]) is None
    # SCRFD without landmarks: faces could not be aligned
    assert recognise_layout(list("abcdef"), [(9, 1)] * 3 + [(9, 4)] * 3) is None


def test_a_recognizer_is_no_detector(shared):
    with pytest.raises(ModelError, match="no detector with landmarks"):
        open_detector(shared / "models" / "mobilefacenet_128.onnx")


def detectors(shared):
    models = shared / "models"
    yield open_detector(models / "yunet_n_dynamic.onnx", 0.8)
    yield open_detector(models / "yunet_n_640_640.onnx", 0.8)
    if importlib.util.find_spec("mtcnn") is None:  # not imported: its own code wants TensorFlow
        pytest.skip("package mtcnn is not installed")
    yield open_detector("", 0.8)


def test_all_detectors_agree_on_a_real_photo(shared):
    pytest.importorskip("onnxruntime")
    image = np.asarray(Image.open(shared / "real" / "friends" / "friends2.jpg"))
    results = [detector.detect(image) for detector in detectors(shared)]
    first = results[0]
    assert len(first) == 6 and ((first.scores_N > 0.85) & (first.scores_N < 0.96)).all()
    for other in results[1:]:
        assert len(other) == 6
        for box, points in zip(other.boxes_N4, other.points_N52):
            # between their eyes and mouths two detectors differ by less than a sixth of a face
            distance = np.abs(first.points_N52 - points).max((1, 2))
            assert distance.min() < (box[2] - box[0]) / 6


def test_no_face_and_a_tiny_picture_give_none(shared):
    pytest.importorskip("onnxruntime")
    for detector in detectors(shared):
        for size in ((1, 1), (1, 300), (64, 64)):
            found = detector.detect(np.zeros((*size, 3), np.uint8))
            assert isinstance(found, Faces) and len(found) == 0 and found.points_N52.shape == (0, 5, 2)
