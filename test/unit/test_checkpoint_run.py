"""What a run saves and resumes: nothing lost, nothing wrong taken, by a tiny network of its own."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random

import pytest
import torch
import workers_checkpoint as workers
from tiny_set import make_tiny_set

import model
from checkpoint import layout, lock, run, sharded, store
from config import Config, replace
from learner import Learner
from runtime.errors import CheckpointError, UserError

KINDS = [
    "pth",
    pytest.param("sharded", marks=pytest.mark.skipif(not sharded.available(), reason="needs torch 2.3")),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return str(make_tiny_set(tmp_path_factory.mktemp("set")))


@pytest.fixture
def base(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(model, "BACKBONES", dict(model.BACKBONES))

    @model.register("own_net")
    def make(embedding_size):
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 7, 16),
            torch.nn.BatchNorm2d(4),
            torch.nn.Flatten(),
            torch.nn.Linear(196, embedding_size),
        )

    return Config(
        net_mode="own_net", embedding_size=8, data_path=pictures, batch_size=4, epochs=1, max_iter=3, lr=0.1,
        work_path=str(tmp_path / "work"), device_type="cpu", num_workers=0, with_test=False, tensorboard=False,
    )  # fmt: skip


def trained(config, **changes) -> Learner:
    learner = Learner.from_config(replace(config, **changes))
    learner.train()
    return learner


def checkpoints_of(learner) -> list:
    return sorted([*learner.checkpoints.models.glob("*.pth"), *learner.checkpoints.sharded.glob("0*")])


def damage(path) -> None:
    """One bit of the last number of the class centers."""
    if path.is_dir():
        piece = layout.read_index(path).tensors["rows.weight"].pieces[-1]
        file, place = path / piece.file, piece.start + piece.bytes - 1
    else:
        file, place = path, path.stat().st_size // 2
    data = bytearray(file.read_bytes())
    data[place] ^= 64
    file.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_another_class_count_or_size_refuses_and_prunes_nothing(base, kind):
    before = checkpoints_of(trained(base, checkpoint=kind))
    for changes in ({"embedding_size": 16}, {"num_classes": 50}):
        with pytest.raises(CheckpointError, match="this run wants|classes, the data"):
            Learner.from_config(replace(base, checkpoint=kind, resume="auto", **changes))
    assert checkpoints_of(Learner.from_config(base)) == before


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_whole_the_run_stops(base, kind):
    learner = trained(base, checkpoint=kind, epochs=2)
    for path in checkpoints_of(learner):
        damage(path)
    for wanted in ("auto", "newest"):
        with pytest.raises(CheckpointError, match="holds checkpoints, and none of them is whole"):
            Learner.from_config(replace(base, checkpoint=kind, resume=wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_run_deletes_nothing_of_an_earlier_one(base, kind):
    before = checkpoints_of(trained(base, checkpoint=kind, epochs=2, keep=0))
    after = checkpoints_of(trained(base, checkpoint=kind, epochs=2, keep=0, seed=7))
    assert set(before) < set(after)
    resumed = trained(base, checkpoint=kind, epochs=4, keep=0, resume="newest")  # and a resumed one knows its own
    assert set(before) < set(checkpoints_of(resumed))
    assert len(checkpoints_of(resumed)) <= len(before) + 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_clock_that_is_put_back_changes_no_order(base, kind, monkeypatch):
    learner = trained(base, checkpoint=kind)
    for path in checkpoints_of(learner):
        os.utime(path, (2e9, 2e9))  # saved when the clock was years ahead
        if path.is_file():
            path.rename(path.with_name(path.name.replace("model_20", "model_30")))
    trained(base, checkpoint=kind, epochs=2, resume="newest")
    assert Learner.from_config(replace(base, resume="newest")).progress.epoch == 2


def test_one_minute_holds_checkpoints_of_two_runs(base):
    first = trained(base)
    (before,) = checkpoints_of(first)
    content = before.read_bytes()
    path = store.next_path(first.checkpoints.models, 0, float(before.name.split("_")[-1][:-4]), [])
    assert path != before and path.name > before.name
    assert store.next_path(first.checkpoints.models, 0, 0.5, [before.name]).parent == before.parent
    assert before.read_bytes() == content


def test_two_runs_in_one_folder_are_told_of_each_other(base, tmp_path):
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    (tmp_path / "work").mkdir()
    holder = context.Process(target=workers.hold, args=(tmp_path / "work", theirs), daemon=True)
    holder.start()
    theirs.close()
    assert ours.recv() == "held"
    message = f"another run writes here .process {holder.pid} on .* since .*choose another --work_path"
    with pytest.raises(CheckpointError, match=message):
        trained(base)
    holder.kill()  # the lock goes with the process
    holder.join()
    trained(base)


@pytest.mark.parametrize("kind", KINDS)
def test_permissions_are_those_of_the_umask(base, kind):
    before = os.umask(0o027)
    try:
        learner = trained(base, checkpoint=kind)
    finally:
        os.umask(before)
    for path in checkpoints_of(learner):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640)
        assert {file.stat().st_mode & 0o777 for file in path.glob("*")} <= {0o640}


EDITS = {
    "training.step is str": lambda state: state["training"].update(step="x"),
    "training.step is int -1": lambda state: state["training"].update(step=-1),
    "training.accuracy is float nan": lambda state: state["training"].update(accuracy=float("nan")),
    "training is list": lambda state: state.update(training=[]),
    "holds no training.precision": lambda state: state["training"].pop("precision"),
    "training.rng is int 3": lambda state: state["training"].update(rng=3),
    "does not fit this run": lambda state: state["training"].update(rng=[{"torch": torch.zeros(3)}]),
    "training.saved is int 3": lambda state: state["training"].update(saved=3),
    "head.kernel is NoneType": lambda state: state["head"].update(kernel=None),
    "expected [8, 4]": lambda state: state["head"].update(kernel=torch.zeros(3, 3)),
    "meta.net_mode is int": lambda state: state["meta"].update(net_mode=5),
    "meta.channel_order is str 'grb'": lambda state: state["meta"].update(channel_order="grb"),
    "meta.threshold is list": lambda state: state["meta"].update(threshold=[]),
    "model is list": lambda state: state.update(model=[]),
    "of another network": lambda state: state["optimizer"]["state"].popitem(),
    "not by parameter name": lambda state: state.update(optimizer={"state": 3}),
    "config is NoneType": lambda state: state.update(config=None),
    "TypeError": lambda state: state["config"].update(batch_size="many"),
}


def test_a_file_with_fields_edited_is_one_line(base, tmp_path):
    """81 of 126 such files ended in a traceback."""
    (path,) = checkpoints_of(trained(base))
    for words, edit in EDITS.items():
        state = store.load_pth(path)
        edit(state)
        store.save_pth(tmp_path / "edited.pth", state)
        with pytest.raises(CheckpointError) as caught:
            Learner.from_config(replace(base, resume=str(tmp_path / "edited.pth")))
        assert words in str(caught.value) and str(tmp_path / "edited.pth") in str(caught.value), words


def _places(value, at=()):
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _places(value[key], (*at, key))


ODD = [None, "x", -1, float("nan"), float("inf"), [], {}, 1 << 70, True, [1], {"a": torch.ones(1)}]
ODD += [torch.zeros(2), torch.zeros(3, 3, dtype=torch.int64), torch.zeros(0)]


def test_any_field_may_be_anything(base, tmp_path):
    (path,) = checkpoints_of(trained(base))
    state, chance = store.load_pth(path), random.Random(0)
    places = [at for at in _places(state) if at and at[0] != "config" and at[:2] != ("meta", "versions")]
    refused = 0
    for at in [*(at for at in places if at[0] == "meta"), *chance.sample(places, 60)]:
        edited = copy.deepcopy(state)
        holder = edited
        for key in at[:-1]:
            holder = holder[key]
        holder[at[-1]] = chance.choice(ODD)
        store.save_pth(tmp_path / "edited.pth", edited)
        try:
            Learner.from_config(replace(base, resume=str(tmp_path / "edited.pth")))
        except UserError:
            refused += 1
    assert refused > 30


def test_a_network_alone_is_no_training(base, tmp_path):
    trained(base).recognizer.save(tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="holds no optimizer.*--is_finetune"):
        Learner.from_config(replace(base, resume=str(tmp_path / "net.pth")))
    assert run.read(tmp_path / "net.pth")[1]["meta"]["net_mode"] == "own_net"


@pytest.mark.skipif(not sharded.available(), reason="needs torch 2.3")
def test_two_saves_of_one_step_count_as_one(tmp_path):
    with sharded.Saver(tmp_path, keep=2) as saver:
        for name in ("step_1", "step_2", "step_2", "step_3", "step_3"):
            saver.save(name, {"name": name}, {})
    assert [path.name for path in layout.named(tmp_path)] == ["000003-step_2", "000005-step_3"]


def test_a_lock_says_who_held_it_last(tmp_path):
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
