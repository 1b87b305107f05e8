"""A run whose checkpoints live in a remote store: uploaded beside the training, downloaded before it."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from remote_stores import WebHDFS, serve
from tiny_set import make_tiny_set

from checkpoint import remote, sharded
from config import Config, replace
from learner import Learner
from runtime.errors import CheckpointError

pytest.importorskip("fsspec", reason="remote stores need fsspec")
pytest.importorskip("requests", reason="webhdfs:// needs requests")


@pytest.fixture
def hdfs(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serve(WebHDFS) as disk:
        disk.password = ("name", "secret")
        yield disk


@pytest.fixture
def base(tmp_path, hdfs):
    return Config(
        net_mode="mobilefacenet",
        embedding_size=16,
        data_path=str(make_tiny_set(tmp_path / "set")),
        batch_size=4,
        epochs=1,
        max_iter=3,
        lr=1e-3,
        work_path=str(tmp_path / "work"),
        device_type="cpu",
        num_workers=0,
        with_test=False,
        tensorboard=False,
        fs_name=f"webhdfs://{hdfs.url}",
        fs_ugi="name,secret",
    )


@pytest.mark.parametrize("checkpoint", ["pth", "sharded"])
@pytest.mark.slow
def test_another_machine_goes_on_from_the_store(base, tmp_path, checkpoint, monkeypatch):
    if checkpoint == "sharded" and not sharded.available():
        pytest.skip("sharded checkpoints need torch 2.3")
    base = replace(base, checkpoint=checkpoint, fs_dir_for_save="runs/one")
    monkeypatch.setattr(sys, "argv", ["train.py", f"--fs_ugi={base.fs_ugi}"])
    first = Learner.from_config(base)
    first.train()
    assert "secret" not in (tmp_path / "work/log/metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "work")
    second = Learner.from_config(replace(base, fs_checkpoint_dir="runs/one", epochs=2))
    assert second.progress.step == first.progress.step == 3
    for name, value in first.backbone.state_dict().items():
        assert torch.equal(value, second.backbone.state_dict()[name]), name
    for name in ("weight", "momentum"):
        assert torch.equal(first.head.local_state()[name], second.head.local_state()[name])
    # a machine that still has the first checkpoint takes the store's newer one
    second.train()
    older = replace(base, work_path=str(tmp_path / "older"), fs_dir_for_save="", resume="auto")
    Learner.from_config(older).train()
    third = Learner.from_config(replace(older, fs_checkpoint_dir="runs/one"))
    assert third.progress.step == 6 and "downloaded" in str(third.resumed)
    # and one with the newest goes on from that, also where the store is away
    monkeypatch.setattr("checkpoint.run.OWN_PATIENCE_S", 0.0)
    for away in (base.fs_name, "webhdfs://127.0.0.1:9"):
        fourth = Learner.from_config(replace(base, fs_name=away, fs_checkpoint_dir="runs/one", resume="auto"))
        assert fourth.progress.step == 6 and "downloaded" not in str(fourth.resumed)


def test_an_empty_store_is_an_error_unless_a_new_start_is_asked_for(base):
    with pytest.raises(CheckpointError, match="runs/none: holds no files"):
        Learner.from_config(replace(base, fs_checkpoint_dir="runs/none"))
    assert Learner.from_config(replace(base, fs_checkpoint_dir="runs/none", resume="auto")).progress.step == 0


def test_a_store_that_stays_away_leaves_the_checkpoint_here(base, monkeypatch, caplog):
    monkeypatch.setattr(remote.Uploader.__init__, "__defaults__", (0.2, 0.05))
    with monkeypatch.context() as patch:
        patch.setattr(remote.Store.try_out, "__defaults__", (0.0, 0.05))
        with pytest.raises(CheckpointError, match="webhdfs://127.0.0.1:9/runs/one: nothing can be kept there"):
            Learner.from_config(replace(base, fs_name="webhdfs://127.0.0.1:9", fs_dir_for_save="runs/one")).train()
    monkeypatch.setattr(remote.Store, "try_out", lambda self: None)  # it goes away later
    learner = Learner.from_config(replace(base, fs_name="webhdfs://127.0.0.1:9", fs_dir_for_save="runs/one"))
    with pytest.raises(CheckpointError, match="did not reach webhdfs://127.0.0.1:9/runs/one and are only here"):
        learner.train()
    saved = list(learner.checkpoints.models.glob("*.pth"))
    assert len(saved) == 1
    assert f"{saved[0]} stays here: not uploaded to webhdfs://127.0.0.1:9/runs/one" in caplog.text


def test_the_password_may_come_from_the_environment(base, monkeypatch):
    monkeypatch.setenv("FS_UGI", "name,secret")
    learner = Learner.from_config(replace(base, fs_ugi="", fs_dir_for_save="runs/two"))
    learner.train()
    assert (
        Learner.from_config(replace(base, fs_checkpoint_dir="runs/two", resume="newest", epochs=2)).progress.step == 3
    )
