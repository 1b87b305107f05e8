"""Checkpoints: `.pth` files, sharded directories with their index, and a store's manifests."""

from __future__ import annotations

import contextlib
import json
from collections import OrderedDict
from functools import cache
from unittest import mock

import torch
from run import target
from targets.data import files_of, written

CLASSES, WIDTH = 12, 3


def _state() -> dict:
    """Of every kind that a state holds, and small."""
    notes = OrderedDict(a=torch.arange(6.0).reshape(2, 3), b=torch.ones(3, dtype=torch.float16), c=torch.tensor(5))
    notes._metadata = {"": {"version": 2, "channel_order": "rgb"}}
    return {
        "model": notes,
        "optimizer": {
            "state": {"a": {"momentum_buffer": torch.ones(2, 3)}},
            "groups": [{"lr": 0.1, "nesterov": False}],
        },
        "epoch": 3,
        "config": {"lr": 1e-3, "milestones": [1, 2], "name": None, "bytes": b"\x00\xff"},
        "meta": {"net_mode": "own", "channel_order": "rgb", "threshold": 1.5},
    }


def _pth_files() -> list:
    def save(**options):
        return lambda folder: torch.save(_state(), folder / "a.pth", **options)

    return [written(save()), written(save(_use_new_zipfile_serialization=False))]


def _build_without_memory() -> None:
    """What a recognised layout does; torch imports half of itself for it the first time."""
    from model import create_model

    with torch.device("meta"):
        create_model("iresnet", 18)


@target(_pth_files, prepare=_build_without_memory)
def pth(folder):
    from checkpoint import store
    from model import foreign

    content = store.load_pth(folder / "a.pth")
    try:
        foreign.recognise(content, place="a.pth")
    except store.CheckpointError as refused:
        assert len(str(refused)) <= 300  # not a net's; reading it was what counts


@cache
def _learner():
    """A training of a net of two layers; targets read their files into it."""
    import model
    from config import Config
    from data.synthetic import SyntheticDataset
    from learner import Learner

    @model.register("fuzz_net")
    def fuzz_net(embedding_size):
        linear = torch.nn.Linear(3, embedding_size)
        return torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), linear, torch.nn.BatchNorm1d(embedding_size)
        )

    options = {"net_mode": "fuzz_net", "embedding_size": 4, "batch_size": 4, "num_workers": 0, "device_type": "cpu"}
    config = Config(**options, val_targets=(), data_mode="synthetic", work_path="out")
    return Learner.from_config(config, dataset=SyntheticDataset(8, CLASSES))


def _trainings() -> list:
    from checkpoint import store

    learner = _learner()

    def save(folder):
        learner.checkpoints.models = folder
        path = learner.save()
        torch.save(store.load_pth(path), folder / "a.pth")  # without the checksum, which would refuse every case
        path.unlink()

    return [written(save)]


@target(_trainings, prepare=_learner)
def training_pth(folder):
    """A .pth of ours whose values are other ones: through the schema, into a recognizer and a training."""
    from recognizer import Recognizer
    from runtime.errors import UserError

    refused = None
    try:
        Recognizer.load(folder / "a.pth", _learner().device)
    except UserError as error:
        refused = error
    _learner().resume(str(folder / "a.pth"))
    if refused is not None:
        raise refused


def _directories() -> list:
    """A directory of today, whose index comes without its checksum (the target adds it), and one of the first."""
    from checkpoint import layout, sharded
    from runtime.shard import RowShard

    rows = torch.arange(float(CLASSES * WIDTH)).reshape(CLASSES, WIDTH)
    state = {key: value for key, value in _state().items() if key != "config"}

    def today(folder):
        with sharded.Saver(folder) as saver:
            local = {"rng": torch.arange(4)}
            saver.save("a", state, {"weight": (rows, RowShard.of(CLASSES))}, local)
        index = folder / "000001-a" / "index.json"
        index.write_text(json.dumps(json.loads(index.read_bytes())["index"]))

    def first(folder):
        today(folder)
        path = folder / "000001-a"
        content = json.loads((path / "index.json").read_bytes())
        content["format"] = layout.OLD_FORMAT
        for stored in content["tensors"].values():
            for piece in stored["pieces"]:
                data = (path / piece[2]).read_bytes()[piece[3] : piece[3] + piece[4]]
                piece[5:] = [layout.zlib.crc32(data)]
        (path / "index.json").write_text(json.dumps(content))

    samples = []
    for write in (today, first):
        sample = written(write)
        samples.append({name: sample[name] for name in sample if name.endswith((".bin", ".json"))})
    return samples


@target(_directories)
def sharded_directory(folder):
    from checkpoint import layout, reshard, sharded
    from runtime.files import checksum
    from runtime.shard import RowShard

    index = folder / "000001-a" / "index.json"
    with contextlib.suppress(OSError):
        if index.is_file() and not index.is_symlink() and index.stat().st_size < 1 << 20:
            text = index.read_bytes()
            if layout.OLD_FORMAT.encode() not in text:
                index.write_bytes(b'{"sha256": "%s", "index": %s}' % (checksum(text).encode(), text))
    rows = torch.zeros(CLASSES, WIDTH)
    sharded.load(reshard.find(folder), {"weight": (rows, RowShard.of(CLASSES))})


def _stores() -> list:
    from checkpoint import remote

    def write(folder):
        for number in (1, 2):
            path = folder / "here" / f"00000{number}-step_{number}"
            path.mkdir(parents=True)
            (path / "index.json").write_text("{}" * number)
            uploader = remote.Uploader(remote.Store(str(folder / "store")))
            uploader.put(path, number)
            assert not uploader.close()

    return [{name: data for name, data in written(write).items() if name.startswith("store/")}]


@target(_stores)
def manifest(folder):
    from checkpoint import remote

    # without a thread for each question: the watch over a store that is silent costs more than the rest
    with mock.patch.object(remote, "_watched", lambda store, action: action()):
        path = remote.download(remote.Store(str(folder / "store")), folder / "back", 0.0, 0.01)
    assert files_of(path)
