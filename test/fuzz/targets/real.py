"""Files that the original tools wrote, where the collection of them lies beside the project."""

from __future__ import annotations

import numpy as np
from run import ROOT, target
from targets.data import _use_pairs, use

SHARED = ROOT.parent / "shared"


def _files(folder: str, *names: str) -> dict:
    return {name: (SHARED / folder / name).read_bytes() for name in names}


if SHARED.is_dir():

    @target(
        lambda: [
            _files("golden/mxnet_recordio", "train.rec", "train.idx", "property"),
            _files("real/adaface_mini_rec", "train.rec", "train.idx"),
        ],
        weight=0.1,
    )
    def recordio_real(folder):
        from data import open_dataset

        use(open_dataset(folder))

    @target(lambda: [_files("real/tipc", "small_lfw.bin")], weight=0.1)
    def pairs_bin_real(folder):
        _use_pairs(folder / "small_lfw.bin")

    @target(lambda: [_files("real/friends", "index.bin")], weight=0.1)
    def index_bin_real(folder):
        from deploy.gallery import read_index_bin

        for name, vector in read_index_bin(folder / "index.bin"):
            assert isinstance(name, str) and vector.dtype == np.float32
