"""PLSC's interface: its values, its setters, the documents' examples, its own weights."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_set import jpeg, make_tiny_set

import model
import plsc
import plsc.config
from data.image_list import write_list
from plsc import learning_rate as rates
from plsc import weights
from plsc.entry import Entry
from plsc.models.base_model import BaseModel
from plsc.models.resnet import ResNet50
from plsc.reader import batch
from plsc.utils import base64_reader, jpeg_reader
from plsc.utils.fp16_lists import AutoMixedPrecisionLists
from runtime.errors import CheckpointError, ConfigError, DataError, ModelError

ROOT = Path(__file__).resolve().parents[2]
CLASSES, SHOTS = 4, 4


@pytest.fixture(scope="module")
def train_data(tmp_path_factory):
    """The data set as PLSC's document lays it out: images, label.txt, lfw.bin."""
    folder = tmp_path_factory.mktemp("plsc") / "train_data"
    (folder / "images").mkdir(parents=True)
    items = []
    for number in range(CLASSES * SHOTS):
        name = f"images/{number:08d}.jpg"
        (folder / name).write_bytes(jpeg(number // SHOTS, number % SHOTS))
        items.append((name, number // SHOTS))
    write_list(folder / "label.txt", items)
    (folder / "label.txt").write_text((folder / "label.txt").read_text().replace("\t", " "))
    make_tiny_set(folder / "rec")
    os.replace(folder / "rec/lfw.bin", folder / "lfw.bin")
    return folder


@pytest.fixture
def small(train_data, tiny_net, tmp_path, monkeypatch):
    """A user's folder with train_data, and defaults by which an example trains in a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLSC_DEVICE", "cpu")
    os.symlink(train_data, tmp_path / "train_data")
    before = dict(plsc.config.config)
    plsc.config.config.update(
        model_name="tiny", emb_dim=16, num_classes=CLASSES, train_batch_size=4, train_epochs=1,
        loss_type="arcface", train_image_num=16, test_batch_size=10,
    )  # fmt: skip
    yield tmp_path
    plsc.config.config.clear()
    plsc.config.config.update(before)


# --- values ----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_seeds_tables():
    entry = Entry()
    for name, value in dict(
        train_batch_size=128, train_image_num=5822653, train_epochs=120, warmup_epochs=0, lr=0.1,
        lr_steps=(100000, 160000, 220000), val_targets="lfw", test_batch_size=120, with_test=True,
        model_name="ResNet50", checkpoint_dir="", loss_type="dist_arcface", num_classes=85742,
        image_shape=(3, 112, 112), margin=0.5, scale=64.0, emb_dim=512, trainer_id=0, num_trainers=1,
        global_train_batch_size=128, log_period=200, lr_decay_factor=0.1, calc_train_acc=False,
    ).items():  # fmt: skip
        assert getattr(entry, name) == value, name
    assert entry.dataset_dir == os.path.abspath("train_data") and entry.model_save_dir == os.path.abspath("output")
    options = entry.options()
    assert (options.net_mode, options.net_depth, options.weight_decay, options.decay_norms) == (
        "resnet",
        50,
        5e-4,
        True,
    )


def test_the_learning_rate_value_for_value():
    for ranks, base, steps in ((1, 0.0125, 45490), (8, 0.1, 5687), (16, 0.2, 2844)):
        assert rates.steps_per_epoch(5822653, ranks, 128) == steps
        assert rates.base_rate(0.1, 128 * ranks) == base
    rate = rates.learning_rate(0.1, 0.2, (100, 200, 300))
    assert [rate(s) for s in (0, 99, 100, 199, 200, 300, 10**9)] == [0.2 * 0.1**i for i in (0, 0, 1, 1, 2, 3, 3)]
    falling = rates.learning_rate(0.1, 0.0125, (100,), 0.1, 50)
    assert [falling(s) for s in (0, 25, 50, 100)] == [0.1, 0.1 + (0.0125 - 0.1) * 0.5, 0.0125, 0.0125 * 0.1]
    assert rates.base_rate(0.1, 1024, rates.BATCH_2_X) == 0.2
    later = rates.learning_rate_2_x(0.2, (100,), 0.1, 10)
    assert [later(s) for s in (0, 5, 10, 100)] == [0.0, 0.1, 0.2, 0.2 * 0.1]


def test_the_falling_warm_up_is_said(caplog):
    entry = Entry()
    entry.set_warmup_epochs(1)
    with caplog.at_level(logging.INFO):
        rate = entry.learning_rate()
    assert "the warm-up falls: from 0.1 to 0.0125" in caplog.text
    assert rate(0) == 0.1 and rate(45490) == 0.0125


@pytest.mark.parametrize(
    "name,given,attribute,value",
    [
        ("set_val_targets", dict(targets="lfw,cfp_fp"), "val_targets", "lfw,cfp_fp"),
        ("set_train_batch_size", dict(size=7), "global_train_batch_size", 7),
        ("set_train_batch_size", dict(batch_size=7), "train_batch_size", 7),
        ("set_test_batch_size", dict(batch_size=7), "test_batch_size", 7),
        ("set_model_save_dir", dict(dir="a"), "model_save_dir", os.path.abspath("a")),
        ("set_model_save_dir", dict(directory="a"), "model_save_dir", os.path.abspath("a")),
        ("set_dataset_dir", dict(directory="a"), "dataset_dir", os.path.abspath("a")),
        ("set_checkpoint_dir", dict(dir=""), "checkpoint_dir", ""),
        ("set_calc_acc", dict(calc=True), "calc_train_acc", True),
        ("set_train_image_num", dict(num=3), "train_image_num", 3),
        ("set_class_num", dict(num=3), "num_classes", 3),
        ("set_emb_size", dict(size=3), "emb_dim", 3),
        ("set_train_epochs", dict(num=3), "train_epochs", 3),
        ("set_warmup_epochs", dict(num=3), "warmup_epochs", 3),
        ("set_loss_type", dict(type="softmax"), "loss_type", "softmax"),
        ("set_image_shape", dict(shape=[3, 112, 112]), "image_shape", [3, 112, 112]),
        ("set_with_test", dict(with_test=False), "with_test", False),
        ("set_log_period", dict(period=3), "log_period", 3),
        ("set_lr_decay_factor", dict(factor=0.5), "lr_decay_factor", 0.5),
        ("set_step_boundaries", dict(boundaries=[1, 2]), "lr_steps", (1, 2)),
    ],
)
def test_setters_by_either_name(name, given, attribute, value):
    entry = Entry()
    assert getattr(entry, name)(**given) is None
    assert getattr(entry, attribute) == value
    getattr(Entry(), name)(*given.values())


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda e: e.set_loss_type("distarcface"), "choose from softmax, arcface"),
        (lambda e: e.set_model(torch.nn.Linear(1, 1)), "no instance of"),
        (lambda e: e.set_image_shape(112), "list or tuple"),
        (lambda e: e.set_optimizer(3), "a function of the parameters"),
        (lambda e: e.set_step_boundaries(3), "a list of steps"),
        (lambda e: e.train(), r"torchrun --nproc_per_node=2 .*set_loss_type\('arcface'\)"),
        (lambda e: (e.set_image_shape((3, 224, 224)), e.options()), "align and crop"),
        (lambda e: (setattr(e, "model_name", "VGG"), e.options()), "choose from ResNet50"),
        (lambda e: (e.set_train_batch_size(0), e.options()), "--batch_size"),
        (lambda e: e.test(), "set_checkpoint_dir"),
    ],
)
def test_wrong_values_are_one_line_and_a_value_error(call, says):
    with pytest.raises(ValueError, match=says) as caught:
        call(Entry())
    assert "\n" not in str(caught.value)


def test_the_password_is_in_no_log(caplog):
    with caplog.at_level(logging.DEBUG):
        Entry().set_hdfs_info("hdfs://here:9000", "name,passw0rd", "some_dir")
        Entry().set_hdfs_info(fs_name="hdfs://u:passw0rd@here:9000", fs_ugi="name,passw0rd", fs_checkpoint_dir="x")
    assert "here:9000" in caplog.text and "passw0rd" not in caplog.text


def test_networks_by_name():
    counts = {
        "ResNet50": 43_584_985,
        "ResNet101": 93_939_459,
        "ResNet152": 109_613_861,
        "ResNet100": 65_145_074,
        "ResNet101_basic": 54_215_650,
        "ResNet152_basic": 70_753_779,
        "ResNet101_narrow": 15_544_131,
        "ResNet152_narrow": 16_538_213,
    }
    for name, count in counts.items():
        entry = Entry()
        entry.model_name = name
        net_mode, net_depth = entry._network()
        with torch.device("meta"):
            net = model.create_model(net_mode, net_depth, 512)
        assert sum(p.numel() for p in net.parameters()) == count, name
    entry = Entry()
    entry.model_name = "iresnet_18"
    assert entry._network() == ("iresnet", 18)


# --- the documents' examples -----------------------------------------------------------------------------------------


def examples(kind):
    text = (ROOT / "docs/plsc.md").read_text(encoding="utf-8")
    return dict(re.findall(rf"<!-- {kind}: (\w+) -->\n```python\n(.*?)```", text, re.DOTALL))


def test_both_documents_show_the_same_code():
    blocks = [
        re.findall(r"```python\n.*?```", (ROOT / f"docs/plsc{end}.md").read_text(), re.DOTALL) for end in ("", "_zh")
    ]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 26


def test_what_is_shown_as_before_is_the_seeds(shared):
    seed = (shared / "seeds/000_d0c5616d2fc4d896.txt").read_text(encoding="utf-8")
    assert list(examples("before").values()) == re.findall(r"```python\n(.*?)```", seed, re.DOTALL)


def run_example(name, folder, monkeypatch, argv=()):
    code = examples("after")[name]
    (folder / f"{name}.py").write_text(code)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
    monkeypatch.syspath_prepend(str(folder))
    exec(compile(code, f"{name}.py", "exec"), {"__name__": "__main__"})


def test_train_val_and_export_as_printed(small, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    run_example("train", small, monkeypatch)
    assert re.search(r"Pass:0 batch:0 lr:0\.0003906[23] loss:\d+\.\d{6} qps:\d+\.\d{2}$", caplog.text, re.MULTILINE)
    assert re.search(r"End pass 0, train_loss \d+\.\d{6}$", caplog.text, re.MULTILINE)
    trained = re.findall(
        r"\[lfw\]\[0\]XNorm: (\d+\.\d{5})\n.*\[lfw\]\[0\]Accuracy-Flip: (\d\.\d{5}\+-\d\.\d{5})", caplog.text
    )
    assert len(trained) == 1
    meta = json.loads((small / "saved_model/0/meta.json").read_text())
    assert (meta["pretrain_nranks"], meta["emb_dim"], meta["num_classes"]) == (1, 16, CLASSES)
    caplog.clear()
    run_example("val", small, monkeypatch)
    assert re.findall(r"\[lfw\]XNorm: (\d+\.\d{5})\n.*\[lfw\]Accuracy-Flip: (\S+)", caplog.text) == trained
    assert "test time: " in caplog.text
    os.replace(small / "saved_model/0", small / "pretrain_model")
    (small / "inference_model").mkdir()
    (small / "inference_model/mine.txt").write_text("stays")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    run_example("export", small, monkeypatch)
    left = {"mine.txt", "model.onnx", "model.pth"}
    assert {path.name for path in (small / "inference_model").iterdir()} == left
    from deploy.backends import OnnxRecognizer
    from recognizer import Recognizer

    faces = np.random.RandomState(0).randint(0, 256, (3, 112, 112, 3)).astype(np.uint8)
    exported = OnnxRecognizer(small / "inference_model/model.onnx").embed(faces)
    assert (exported * Recognizer.load(small / "pretrain_model", "cpu", opt_level="O0").embed(faces)).sum(
        1
    ) == pytest.approx(1, abs=1e-5)


def test_setters_example_and_continuing(small, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    plsc.config.config.with_test = False
    code = examples("after")["class_num"].replace("85742", str(CLASSES))  # the classes that are there
    exec(code, {"__name__": "__main__"})
    assert sorted(path.name for path in (small / "output").iterdir() if path.name.isdigit()) == ["0"]
    entry = Entry()
    entry.set_train_epochs(2)
    entry.set_checkpoint_dir("output/0")
    entry.set_calc_acc(True)
    entry.set_log_period(1)
    caplog.clear()
    entry.train()
    assert "Pass:1 batch:0" in caplog.text and "Pass:0" not in caplog.text
    assert re.search(r"qps:\S+ acc1:\d\.\d{6} acc5:\d\.\d{6}$", caplog.text, re.MULTILINE)
    assert entry.has_run_train and entry.train_pass_id == 1
    entry = Entry()
    entry.set_class_num(CLASSES + 2)
    entry.set_checkpoint_dir("output/0")
    entry.set_model_save_dir("tuned")
    caplog.clear()
    entry.train()
    assert "has 4 classes and this training 6: its class centers are not taken" in caplog.text
    assert "Pass:0 batch:0" in caplog.text


def test_mixed_precision_example(small, monkeypatch):
    plsc.config.config.with_test = False
    run_example("amp", small, monkeypatch)
    assert (small / "output/0/meta.json").is_file()


def test_readers_example(small, monkeypatch, caplog):
    plsc.config.config.with_test = False
    (small / "reader.py").write_text(examples("after")["reader"])
    monkeypatch.delitem(sys.modules, "reader", raising=False)
    caplog.set_level(logging.INFO)
    run_example("reader_train", small, monkeypatch, ["--data_dir=./train_data"])
    assert "End pass 0" in caplog.text and (small / "output/0/meta.json").is_file()


@pytest.mark.slow
def test_the_model_of_the_example(small, monkeypatch, caplog):
    """The documented network trains, and is ResNet50 of this project to the last parameter."""
    plsc.config.config.update(with_test=False, emb_dim=512, train_batch_size=2, train_image_num=2)
    caplog.set_level(logging.INFO)
    (small / "few").mkdir()
    (small / "few/images").symlink_to(small / "train_data/images")
    (small / "few/label.txt").write_text("images/00000000.jpg 0\nimages/00000004.jpg 1\n")
    plsc.config.config.dataset_dir = "few"
    space = {"__name__": "__main__"}
    exec(compile(examples("after")["model"], "model.py", "exec"), space)
    assert "End pass 0" in caplog.text
    own = space["ins"].model
    assert sum(p.numel() for p in own.parameters()) == 43_584_985
    with torch.no_grad():
        faces = torch.randn(2, 3, 112, 112, dtype=torch.float64)
        ours = ResNet50().eval()
        fitted = weights._fitted(by_kind(own), ours.net)
        ours.net.load_state_dict(fitted)
        torch.testing.assert_close(ours.double()(faces), own.double().eval()(faces), rtol=1e-9, atol=1e-9)


def by_kind(net):
    """A network's values as weights.load finds them in files."""
    found = {"conv": [], "norm": [], "prelu": [], "fc": []}
    for module in net.modules():
        values = {name: value.detach().numpy() for name, value in module.state_dict().items() if "." not in name}
        if isinstance(module, torch.nn.Conv2d):
            found["conv"].append([values["weight"]])
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            found["norm"].append([values[name] for name in ("weight", "bias", "running_mean", "running_var")])
        elif isinstance(module, torch.nn.PReLU):
            found["prelu"].append([values["weight"]])
        elif isinstance(module, torch.nn.Linear):
            found["fc"].append([values["weight"].T, values["bias"]])
    return found


def test_server_and_client_examples(tmp_path, monkeypatch, capsys):
    """The server's lines start a server of the model that they name; the client's ask one. (test_deploy_serving.py has
    both in processes of their own.)"""
    for name in ("uvicorn", "starlette", "onnx", "onnxruntime"):
        pytest.importorskip(name)
    from tiny_server import ANN, Server, face

    import plsc_serving.run

    started = []

    class Process:
        returncode = 0

        def __init__(self, command, env):
            started.append(command)

        def poll(self):
            return self.returncode

        def terminate(self):
            pass

        def wait(self, _seconds):
            pass

    monkeypatch.setattr(plsc_serving.run.subprocess, "Popen", Process)
    monkeypatch.chdir(tmp_path)
    server = Server(tmp_path, monkeypatch)
    try:
        exec(examples("after")["server"].replace("/XXX/XXX", str(tmp_path / "model.onnx")), {})
        command = started[0]
        assert command[1:5] == ["-m", "deploy.server", "--model", str(tmp_path / "model.onnx")]
        assert command[5:7] == ["--port", "8010"] and "port = 8010" in capsys.readouterr().out
        (tmp_path / "data").mkdir()
        (tmp_path / "data/00000000.jpg").write_bytes(face(ANN))
        exec(examples("after")["client"].replace("8010", str(server.port)), {})
        expected = server.engine.recognizer.embed(np.full((1, 112, 112, 3), ANN, np.uint8))
        assert json.loads(capsys.readouterr().out) == pytest.approx(expected[0].tolist(), abs=1e-7)
    finally:
        server.close()


def test_hdfs_examples(small, monkeypatch, caplog):
    """A store of fsspec's in a folder stands for HDFS, as the addresses of both are the same to checkpoint.remote."""
    pytest.importorskip("fsspec")
    caplog.set_level(logging.DEBUG)
    plsc.config.config.with_test = False
    monkeypatch.chdir(small)
    (small / "store").mkdir()
    address = f"file://{small}/store"
    for name in ("hdfs_save", "hdfs_load"):
        code = examples("after")[name].replace("you_hdfs_addr", address)
        if name == "hdfs_load":
            os.rename("saved_model", "trained")
            os.mkdir("saved_model")
            plsc.config.config.train_epochs = 2
        exec(code, {"__name__": "__main__"})
        assert any((small / "store/some_dir").rglob("*.pth"))
    assert "passwd" not in caplog.text and "End pass 1" in caplog.text
    entry = Entry()
    entry.set_checkpoint_dir("saved_model2")
    entry.set_hdfs_info("webhdfs://127.0.0.1:9", "name,passwd", fs_checkpoint_dir="some_dir")
    monkeypatch.setattr("checkpoint.remote.LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr("checkpoint.remote.download.__defaults__", (0.1, 0.01, -1))
    with pytest.raises(CheckpointError, match="not downloaded"):
        entry.test()


def trained_by(entry):
    """Trains, and gives the Trainer that did."""
    from plsc.trainer import Trainer

    made = []
    original = Trainer._set_head

    def remember(self, *attributes):
        original(self, *attributes)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_set_head", remember)
        entry.train()
    return made[0]


def test_optimizer_head_and_lists(small):
    plsc.config.config.update(with_test=False, loss_type="softmax")
    entry = Entry()
    entry.set_optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
    entry.set_distfc_attr(
        param_attr=plsc.ParamAttr(initializer=0.25, learning_rate=0.0),
        bias_attr=plsc.ParamAttr(initializer=np.float32(0.5), trainable=False),
    )
    lists = AutoMixedPrecisionLists(["batch_norm"], ["prelu", "body.0", "output.1"])
    entry.set_mixed_precision(True, amp_lists=lists)
    found, call = {}, torch.nn.Module.__call__

    def seen(self, x, *rest):
        out = call(self, x, *rest)
        if torch.is_autocast_enabled("cpu"):
            found[self] = out.dtype
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", seen)
        trainer = trained_by(entry)
    half, single = torch.bfloat16, torch.float32
    # convolution, batch norm, PReLU, twice; flatten, dropout; linear, batch norm
    body = [single, half, single, half, half, single, single, single]
    assert [found[one] for one in trainer.backbone.body] == body
    assert [found[one] for one in trainer.backbone.output] == [half, single]
    centers = trainer.head.centers.weight
    assert torch.equal(centers[:, :16], torch.full((CLASSES, 16), 0.25))
    assert torch.equal(centers[:, 16], torch.full((CLASSES,), 0.5))
    assert isinstance(trainer.optimizer, torch.optim.AdamW) and trainer.schedule(0) == 0.01
    with torch.no_grad():  # outside of mixed precision nothing of it is left
        assert trainer.backbone.eval()(torch.zeros(1, 3, 112, 112)).dtype == torch.float32


def test_lists_that_are_none():
    for white, black, says in (
        (["conv2d"], ["conv2d"], "on the white list and on the black one"),
        (["softmax", "exp"], [], "exp, softmax: the loss computes in fp32"),
    ):
        with pytest.raises(ValueError, match=says):
            AutoMixedPrecisionLists(white, black)
    with pytest.raises(ConfigError, match="neither an operator"):
        AutoMixedPrecisionLists(custom_black_list=["nothing"]).apply(torch.nn.Linear(1, 1), torch.bfloat16)


def test_b_has_a_decay_and_a_rate_of_its_own():
    """Two steps with momentum, beside torch's own SGD with a group for W and one for b."""
    from head.centers import Centers, Update
    from runtime.shard import RowShard

    for index in (None, torch.tensor([0, 2, 4])):
        centers = Centers(RowShard(0, 5, 5), 4, 0.9, 0.1, bias=True, normalise=False, dtype=torch.float64)
        centers.weight.normal_(generator=torch.Generator().manual_seed(0))
        centers.rate, centers.bias_rate, centers.bias_decay = 0.5, 3.0, 0.7
        rows = centers.weight.clone() if index is None else centers.weight[index].clone()
        weight, bias = rows[:, :-1].clone(), rows[:, -1:].clone()
        sgd = torch.optim.SGD(
            [dict(params=[weight], lr=0.2 * 0.5, weight_decay=0.1), dict(params=[bias], lr=0.2 * 3, weight_decay=0.7)],
            lr=1.0, momentum=0.9,
        )  # fmt: skip
        for step in range(2):
            grad = torch.randn(len(rows), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            weight.grad, bias.grad = grad[:, :-1].clone(), grad[:, -1:].clone()
            sgd.step()
            Update(centers, 0.2, index)(0, len(rows), grad.clone())
        moved = centers.weight if index is None else centers.weight[index]
        torch.testing.assert_close(moved, torch.cat([weight, bias], 1), rtol=1e-12, atol=1e-12)


def adam_entry(folder, epochs, **given):
    entry = Entry()
    entry.set_optimizer(
        lambda parameters: (
            adam := torch.optim.Adam(parameters, lr=0.01),
            torch.optim.lr_scheduler.StepLR(adam, 3, 0.5),
        )
    )
    entry.set_train_epochs(epochs)
    entry.set_model_save_dir(folder)
    for name, value in given.items():
        setattr(entry, name, value)
    return entry


@pytest.mark.slow
def test_adam_goes_on_where_it_stood(small, caplog):
    plsc.config.config.with_test = False
    whole = trained_by(adam_entry("whole", 2))
    trained_by(adam_entry("half", 1))
    rest = trained_by(adam_entry("rest", 2, checkpoint_dir="half/0"))
    assert rest.schedule(8) == whole.schedule(8) == 0.01 * 0.5**2
    for (name, mine), theirs in zip(rest.backbone.state_dict().items(), whole.backbone.state_dict().values()):
        assert torch.equal(mine, theirs), name
    assert torch.equal(rest.head.centers.weight, whole.head.centers.weight)
    # another optimizer begins anew, and says so
    entry = Entry()
    entry.set_train_epochs(2)
    entry.set_model_save_dir("other")
    entry.set_checkpoint_dir("half/0")
    caplog.clear()
    entry.train()
    assert "the checkpoint's optimizer is 'Adam': SGD begins anew" in caplog.text


def test_test_reader_predict_and_attributes(small, capsys, caplog):
    caplog.set_level(logging.INFO)
    plsc.config.config.with_test = False
    entry = Entry()
    entry.train()
    entry.test_reader = jpeg_reader.test
    entry.test()
    by_reader = re.findall(r"\[lfw\]\[0\]Accuracy-Flip: (\S+)", caplog.text)
    caplog.clear()
    entry.test_reader = None
    entry.test()
    assert by_reader and re.findall(r"\[lfw\]\[0\]Accuracy-Flip: (\S+)", caplog.text) == by_reader
    entry.predict_reader = batch(jpeg_reader.arc_train("train_data", CLASSES), 8)
    entry.predict()
    assert capsys.readouterr().out.count("emb:") == 2


# --- bad input -------------------------------------------------------------------------------------------------------


class NoNetwork(BaseModel):
    pass


class Wide(BaseModel):
    def build_network(self, input, label, is_train):
        return input.mean((2, 3))


def test_models_that_are_none(small):
    for network, says in ((NoNetwork(), "has no build_network"), (Wide(), r"\[2, 3\] for 2 images, and \[2, 16\]")):
        entry = Entry()
        entry.set_model(network)
        with pytest.raises(ModelError, match=says):
            entry.train()


def test_label_is_handed_to_the_network(small):
    seen = []

    class Net(BaseModel):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 16)

        def build_network(self, input, label, is_train):
            seen.append((is_train, None if label is None else tuple(label.shape)))
            return self.linear(input.mean((2, 3)))

    entry = Entry()
    entry.set_model(Net())
    entry.train()
    assert (True, (4, 1)) in seen and (False, None) in seen
    entry = Entry()
    entry.set_model(Net())
    entry.set_checkpoint_dir("output/0")
    entry.test()


@pytest.mark.parametrize(
    "line,says",
    [
        ("images/none.jpg 0", "there is no image|cannot be read|damaged"),
        ("/etc/passwd 0", "leaves the data set's folder"),
        ("../outside.jpg 0", "leaves the data set's folder"),
        ("images/00000000.jpg x", "is not 'path label'"),
        ("images/00000000.jpg 9", "beyond num_classes=4|outside the 4 classes"),
    ],
)
def test_bad_lines_of_label_txt(small, line, says):
    (small / "bad").mkdir()
    (small / "bad/images").symlink_to(small / "train_data/images")
    (small / "bad/label.txt").write_text(line + "\n" + "images/00000001.jpg 0\n" * 7)
    entry = Entry()
    entry.set_dataset_dir("bad")
    entry.set_with_test(False)
    with pytest.raises(DataError, match=says) as caught:
        entry.train()
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError):
        list(jpeg_reader.arc_train("bad", CLASSES)())


def test_a_reader_that_is_none(small):
    plsc.config.config.with_test = False
    for reader, says in (
        (lambda: iter(()), "gives no batch"),
        (lambda: iter([[(np.zeros((3, 112, 112)), "x")]]), "is not"),
        (lambda: iter([[(np.zeros((112, 112)), 0)]]), "has shape"),
        (lambda: iter([[(np.zeros((3, 112, 112)), 7)]]), "outside the 4 classes"),
    ):
        entry = Entry()
        entry.train_reader = reader
        with pytest.raises(DataError, match=says):
            entry.train()
    with pytest.raises(ValueError, match="positive"):
        batch(lambda: iter(()), 0)


def test_a_training_set_that_is_not_there(small):
    entry = Entry()
    entry.set_dataset_dir("nowhere")
    with pytest.raises(DataError, match="nowhere: no such folder: set_dataset_dir"):
        entry.train()
    assert not (small / "output").exists()


def test_checkpoints_that_are_none(small):
    for folder, says in (("nowhere", "no such folder"), (".", "holds no checkpoint")):
        entry = Entry()
        entry.set_checkpoint_dir(folder)
        with pytest.raises(CheckpointError, match=says):
            entry.test()


def test_base64_readers(tmp_path, monkeypatch):
    import base64

    lines = [base64.b64encode(jpeg(n, 0)) + b"\t%d\n" % n for n in range(4)]
    for part in range(2):
        (tmp_path / f"base64_rank_{part}").write_bytes(b"".join(lines[part::2]))
    (tmp_path / "file_list.txt").write_text("base64_rank_0\nbase64_rank_1\n")
    with pytest.raises(DataError, match="2 files for 1 ranks"):
        base64_reader.train(tmp_path, 4)
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    samples = list(base64_reader.train(tmp_path, 4)())
    assert [label for _image, label in samples] == [1, 3]
    assert samples[0][0].shape == (3, 112, 112) and samples[0][0].dtype == np.float32
    assert -1 <= samples[0][0].min() and samples[0][0].max() <= 1


# --- PLSC's own weights ----------------------------------------------------------------------------------------------


def variable(array) -> bytes:
    """An array as PLSC 0.1 writes it."""
    code = {"float32": 5, "int64": 3}[str(array.dtype)]

    def varint(value):
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    message = b"\x08" + varint(code) + b"".join(b"\x10" + varint(size) for size in array.shape)
    return struct.pack("<IQIi", 0, 0, 0, len(message)) + message + array.tobytes()


def write_original(folder, net, kernel):
    folder.mkdir()
    patterns = {
        "conv": ("conv2d", ["w_0"]),
        "norm": ("batch_norm", ["w_0", "b_0", "w_1", "w_2"]),
        "prelu": ("prelu", ["w_0"]),
        "fc": ("fc", ["w_0", "b_0"]),
    }
    for kind, layers in by_kind(net).items():
        stem, parts = patterns[kind]
        for number, values in enumerate(layers):
            for part, value in zip(parts, values):
                (folder / f"{stem}_{number}.{part}").write_bytes(variable(np.ascontiguousarray(value)))
    for rank, shard in enumerate(np.array_split(kernel, 2, axis=1)):
        (folder / f"dist@arcface@rank@{rank:05d}.w_0").write_bytes(variable(np.ascontiguousarray(shard)))
    (folder / "meta.json").write_text(json.dumps({"pretrain_nranks": 2, "emb_dim": 16, "num_classes": CLASSES}))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "0"
    net = model.create_model("resnet", 50, 16).eval()
    kernel = np.random.RandomState(0).randn(16, CLASSES).astype(np.float32)
    write_original(folder, net, kernel)
    return folder, net, kernel


@pytest.mark.slow
def test_plscs_own_variables(original, tmp_path):
    folder, net, kernel = original
    found = weights.load(folder, model.create_model("resnet", 50, 16))
    assert weights.is_original(folder)
    assert all(torch.equal(found["model"][key], value) for key, value in net.state_dict().items() if "num_b" not in key)
    assert np.array_equal(found["head"]["kernel"], kernel)
    shutil.copytree(folder, tmp_path / "softmax", ignore=shutil.ignore_patterns("dist@*"))
    bias = np.arange(CLASSES, dtype=np.float32)
    for name, value in (("w_0", kernel), ("b_0", bias)):  # of its data parallel softmax
        (tmp_path / f"softmax/fc_1.{name}").write_bytes(variable(value))
    found = weights.load(tmp_path / "softmax", model.create_model("resnet", 50, 16))["head"]
    assert np.array_equal(found["kernel"], kernel) and np.array_equal(found["bias"], bias)
    named = weights._read_folder(folder)
    with pytest.raises(CheckpointError, match="another network, or another set_emb_size"):
        weights._fitted(named, model.create_model("resnet", 50, 32))
    with pytest.raises(CheckpointError, match="layers of kind conv"):
        weights._fitted(named, model.create_model("mobilefacenet", embedding_size=16))
    cut = tmp_path / "cut"
    cut.write_bytes((folder / "conv2d_0.w_0").read_bytes()[:-4])
    for data in (cut.read_bytes(), b"", b"\0" * 40, b"\xff" * 40):
        cut.write_bytes(data)
        with pytest.raises(CheckpointError):
            weights.read_variable(cut)


@pytest.mark.slow
def test_their_verification_and_training(original, small):
    plsc.config.config.update(model_name="ResNet50", with_test=False, train_batch_size=2, train_image_num=2)
    (small / "few").mkdir()
    (small / "few/images").symlink_to(small / "train_data/images")
    (small / "few/label.txt").write_text("images/00000000.jpg 0\nimages/00000004.jpg 3\n")
    entry = Entry()
    entry.set_dataset_dir("few")
    entry.set_checkpoint_dir(str(original[0]))
    entry.train()
    assert (original[0] / "meta.json").is_file() and (small / "output/0/meta.json").is_file()


def test_pdparams_without_running_them(original, tmp_path):
    _folder, net, _kernel = original
    names = {"running_mean": "_mean", "running_var": "_variance"}
    state = {}
    for key, value in net.state_dict().items():
        stem, part = key.rsplit(".", 1)
        if part != "num_batches_tracked":
            array = value.numpy()
            state[f"{stem}.{names.get(part, part)}"] = array.T if key == "fc.weight" else array
    state["StructuredToParameterName@@"] = {key: key for key in list(state)}
    path = tmp_path / "FresResNet50.pdparams"
    path.write_bytes(pickle.dumps(state, protocol=2))
    found = weights.load(path, model.create_model("resnet", 50, 16))
    assert all(torch.equal(found["model"][key], value) for key, value in net.state_dict().items() if "num_b" not in key)

    class Evil:
        def __reduce__(self):
            return os.system, ("touch evil",)

    path.write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    with pytest.raises(CheckpointError, match="refused"):
        weights.load(path, net)
    path.write_bytes(b"\x80\x02}q")
    with pytest.raises(CheckpointError):
        weights.load(path, net)
