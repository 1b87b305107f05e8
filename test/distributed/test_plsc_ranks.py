"""PLSC's interface on two ranks: sharded losses, their checkpoints on another number of ranks, readers, plsc.launch."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import workers_plsc
from tiny_set import make_tiny_set

from plsc.launch import torchrun_arguments
from runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder where two ranks have trained twice (test/workers_plsc.py)."""
    folder = tmp_path_factory.mktemp("ranks")
    make_tiny_set(folder / "train_data")
    environment = {**os.environ, "PLSC_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "plsc.launch", "--nproc_per_node=2", "--log_dir=log"]
    command += [str(ROOT / "test/workers_plsc.py"), str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_two_ranks_train_and_one_continues(launched, tiny_net, monkeypatch, caplog):
    log = (launched / "log/workerlog.0").read_text()
    assert "Pass:0 batch:0 lr:0.00078125 loss:" in log and "[lfw][0]Accuracy-Flip: " in log
    assert "Pass:0" in (launched / "log/workerlog.1").read_text()
    # one rank, the other loss: the class centers and the user's own optimizer come along
    import plsc
    from plsc import Entry
    from plsc.trainer import Trainer

    monkeypatch.chdir(launched)
    monkeypatch.setenv("PLSC_DEVICE", "cpu")
    caplog.set_level(logging.INFO)
    entry = Entry()
    for name, value in dict(model_name="tiny", emb_dim=16, num_classes=4, train_epochs=2).items():
        setattr(entry, name, value)
    entry.set_train_batch_size(4)
    entry.set_loss_type("arcface")
    entry.set_checkpoint_dir("./trained/0/")
    entry.set_optimizer(workers_plsc.make_adam)
    trainers, begin = [], Trainer.train

    def train(self):
        states = self.optimizer.state.values()
        trainers.append({float(state["step"]) for state in states})
        assert all(state["exp_avg_sq"].any() for state in states)
        begin(self)

    monkeypatch.setattr(Trainer, "train", train)
    entry.train()
    assert trainers == [{2.0}]  # two steps of eight images
    assert "Pass:1 batch:0" in caplog.text and (launched / "output/1/meta.json").is_file()
    assert plsc.config.config.train_batch_size == 128


def test_readers_of_unequal_ranks_stop_together_and_alike_ones_are_said(launched):
    log = (launched / "log/workerlog.0").read_text()
    assert "gives several ranks the same images" in log and log.count("End pass 0") == 2
    assert (launched / "reader/0/meta.json").is_file()


def test_launch_words():
    from argparse import Namespace

    def words(**given):
        base = dict(gpus=None, ips="127.0.0.1", node_ip="127.0.0.1", nproc_per_node=None, started_port=None)
        return torchrun_arguments(Namespace(**{**base, **given}))

    assert words(gpus="0,1,2") == ["--nproc-per-node=3", "--standalone"]
    two = words(gpus="0,1", ips="10.0.0.1,10.0.0.2", node_ip="10.0.0.2")
    assert two == [
        "--nproc-per-node=2", "--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=6070",
    ]  # fmt: skip
    for given, says in (
        (dict(gpus="0,a"), "give numbers"),
        (dict(gpus="0,0"), "give numbers"),
        (dict(ips=""), "is empty"),
        (dict(ips="10.0.0.1,10.0.0.2"), "which is this one"),
    ):
        with pytest.raises(ConfigError, match=says):
            words(**given)
