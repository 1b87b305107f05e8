"""Galleries, photos, the record of tools.align and ONNX files; and other projects' config files."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle

import numpy as np
import torch
from PIL import Image
from run import target
from targets.data import image, written

NAMES, WIDTH = ("Ann", "脸 2", "Bo"), 8
VECTORS_MD = np.eye(len(NAMES), WIDTH, dtype=np.float32)
PRINT = "f" * 64


def _galleries() -> list:
    from deploy.gallery import Gallery

    def make(folder):
        with Gallery.create(folder / "people", PRINT, WIDTH, 1.2) as gallery:
            gallery.add_many(zip(NAMES, VECTORS_MD))

    def saved(save, value, **options) -> bytes:
        out = io.BytesIO()
        save(out, value, **options)
        return out.getvalue()

    bank = {"facebank.pth": b"", "names.npy": saved(np.save, np.array(["Unknown", *NAMES]))}
    out = io.BytesIO()
    torch.save(torch.from_numpy(VECTORS_MD), out)
    bank["facebank.pth"] = out.getvalue()
    index = pickle.dumps({"label": list(NAMES), "feature": list(VECTORS_MD)}, 2)
    out = io.BytesIO()
    np.savez(out, embeddings=VECTORS_MD, names=np.array(["Unknown", *NAMES]))
    return [written(make), bank, {"index.bin": index}, {"facebank.npz": out.getvalue()}]


@target(_galleries)
def gallery(folder):
    from deploy.gallery import open_gallery

    known = ("people", "facebank.pth", "index.bin", "facebank.npz")
    name = next((name for name in known if (folder / name).exists()), "people")
    with open_gallery(folder / name, PRINT, WIDTH) as found:
        found.identify(VECTORS_MD, 1.0)


CONFIG = b"""from easydict import EasyDict as edict

config = edict()
config.margin_list = (1.0, 0.0, 0.4)
config.network = "r50"
config.resume = False
config.output = None
config.embedding_size = 512
config.sample_rate = 0.3
config.fp16 = True
config.momentum = 0.9
config.weight_decay = 5e-4
config.batch_size = 128
config.lr = 0.1 * 2 / 4
config.rec = "/train_tmp/faces_emore"
config.num_classes = 85742
config.num_image = 5822653
config.num_epoch = 20
config.warmup_epoch = 0
config.val_targets = ['lfw', 'cfp_fp', "agedb_30"]
"""


@target(lambda: [{"ms1mv2_r50.py": CONFIG}])
def config_file(folder):
    from configs.foreign import read_config

    recipe, _notes = read_config(folder / "ms1mv2_r50.py", 8)
    recipe.check()


def _photos() -> list:
    modes = [
        ("JPEG", "RGB", 40),
        ("PNG", "RGBA", 40),
        ("PNG", "P", 40),
        ("GIF", "P", 40),
        ("TIFF", "RGB", 16),
        ("BMP", "RGB", 16),
    ]
    deep = io.BytesIO()
    Image.fromarray(np.full((16, 16), 5000, np.uint16)).save(deep, "PNG")
    return [{"photo": image(n, kind, mode, size)} for n, (kind, mode, size) in enumerate(modes)] + [
        {"photo": deep.getvalue()}
    ]


@target(_photos)
def photo(folder):
    from deploy.photos import read_photo

    shown = read_photo(folder / "photo", max_pixels=1 << 20)
    assert shown.dtype == np.uint8 and shown.ndim == 3 and shown.shape[2] == 3


def _records() -> list:
    line = {"photo": "a.jpg", "stamp": [9, 9], "settings": ["", 0.6, "largest", 20, 112], "faces": ["a.jpg"], "why": ""}
    return [{"aligned/align.jsonl": 2 * (json.dumps(line) + "\n").encode(), "photos/a.jpg": image(0)}]


@target(_records)
def align_record(folder):
    from unittest import mock

    from tiny_deploy import RedFaces

    from deploy import photo_set

    with mock.patch.object(photo_set, "open_detector", lambda *_: RedFaces()):
        photo_set.align_folder(folder / "photos", folder / "aligned", workers=1, say=str)


if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):

    def _models() -> list:
        from tiny_deploy import tiny_onnx

        return [written(lambda folder: tiny_onnx(folder / "m.onnx"))]

    @target(_models)
    def onnx_model(folder):
        from deploy.backends import OnnxRecognizer

        recognizer = OnnxRecognizer(folder / "m.onnx", threads=1)
        if recognizer.size <= 224:
            recognizer.embed(np.zeros((1, recognizer.size, recognizer.size, 3), np.uint8))

    def _detector_file(path, outputs: list, side=32) -> None:
        """An ONNX detector that finds nothing: outputs (name, places, width), all zero."""
        import onnx

        helper, numpy_helper, kind = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
        x = helper.make_tensor_value_info("x", kind, [1, 3, side, side])
        nodes, infos, constants = [helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0)], [], []
        for name, places, width in outputs:
            constants.append(numpy_helper.from_array(np.zeros((1, places, width), np.float32), f"zeros_{name}"))
            nodes.append(helper.make_node("Mul", ["mean", f"zeros_{name}"], [name]))
            infos.append(helper.make_tensor_value_info(name, kind, [1, places, width]))
        graph = helper.make_graph(nodes, "detector", [x], infos, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        path.write_bytes(model.SerializeToString())

    def _detectors() -> list:
        places = {stride: (32 // stride) ** 2 for stride in (8, 16, 32)}
        widths = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
        layouts = [
            [(f"{part}_{s}", n, widths[part]) for part in widths for s, n in places.items()],
            [
                (f"{part}{s}", 2 * n, width)
                for part, width in (("a", 1), ("b", 4), ("c", 10))
                for s, n in places.items()
            ],
            [(str(width), 2 * sum(places.values()), width) for width in (4, 2, 10)],
        ]
        return [written(lambda folder, one=one: _detector_file(folder / "m.onnx", one)) for one in layouts]

    @target(_detectors)
    def onnx_detector(folder):
        from deploy.detection import open_detector

        faces = open_detector(folder / "m.onnx", 0.5).detect(np.zeros((40, 30, 3), np.uint8))
        assert faces.boxes_N4.shape == (len(faces), 4) and faces.points_N52.shape == (len(faces), 5, 2)
