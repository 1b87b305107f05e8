"""Galleries and face banks, and other projects' config files."""

from __future__ import annotations

import io
import pickle

import numpy as np
import torch
from run import target
from targets.data import written

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


@target(_galleries, weight=0.5)
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
