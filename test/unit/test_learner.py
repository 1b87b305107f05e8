"""The Learner: its loop, what it writes, and that a resumed run is the run that was interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_set import make_tiny_set

import report
from checkpoint import sharded, store
from config import Config, replace
from learner import Learner
from recognizer import Recognizer
from runtime.errors import CheckpointError, ConfigError, DataError, DeviceError, ModelError, PrecisionError
from runtime.signals import Stopped

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_set(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def base(tiny, tiny_net, tmp_path):
    """Five steps an epoch, two epochs."""
    return Config(
        net_mode="tiny",
        embedding_size=16,
        data_path=str(tiny),
        batch_size=4,
        epochs=2,
        lr=1e-3,
        milestones=(1,),
        work_path=str(tmp_path / "work"),
        device_type="cpu",
        num_workers=0,
        log_every=2,
        with_test=False,
        tensorboard=False,
    )


def metrics(config):
    with open(f"{config.work_path}/log/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def assert_same(a, b, path=""):
    """Tensors equal to the last bit, everything else equal."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def trained(config):
    learner = Learner.from_config(config)
    learner.train()
    return learner


def final_state(config):
    state = store.load_pth(store.newest(f"{config.work_path}/models"))
    state["training"].pop("saved")  # names of files, with the time in them
    return {key: state[key] for key in ("model", "head", "optimizer", "epoch", "training")}


def test_the_run_and_what_it_writes(base):
    config = replace(base, net_mode="mobilefacenet", with_test=True, max_iter=3)
    learner = trained(config)
    assert learner.progress.step == 6 and learner.progress.epoch == 2
    lines = metrics(config)
    kinds = [line["kind"] for line in lines]
    assert kinds[0] == "run" and kinds[-1] == "end" and lines[-1]["reason"] == "finished"
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [2, 3, 4, 6]
    assert [round(line["lr"], 6) for line in steps] == [1e-3, 1e-3, 1e-4, 1e-4]
    verifications = [line for line in lines if line["kind"] == "verify"]
    assert [(v["untrained"], v["set"]) for v in verifications] == [(True, "lfw"), (False, "lfw"), (False, "lfw")]
    assert sum(line["kind"] == "window" for line in lines) == 2
    names = sorted(p.name for p in learner.checkpoints.models.iterdir())
    assert any("_epoch:1_" in name for name in names)
    state = store.load_pth(learner.checkpoints.models / names[-1])
    assert list(state)[:1] == ["model"] and {"model", "head", "optimizer", "epoch", "config"} <= set(state)
    assert tuple(state["head"]["kernel"].shape) == (16, 4)
    assert state["meta"]["channel_order"] == "rgb" and state["meta"]["num_classes"] == 4


def test_resume_in_the_middle_of_an_epoch_is_bit_identical(base, tmp_path):
    # the net has dropout, so the generators' state matters
    whole = replace(base, work_path=str(tmp_path / "whole"))
    trained(whole)

    class Interrupted(Learner):
        def _leave_if_asked(self, *_):
            if self.progress.step == 7:
                raise Stopped(signal.SIGTERM)

    part = replace(base, work_path=str(tmp_path / "part"))
    with pytest.raises(Stopped):
        Interrupted.from_config(part).train()
    assert metrics(part)[-1]["reason"] == "signal"
    # a new process would start from another seed than where the generators stood
    torch.manual_seed(99)
    trained(replace(part, resume="auto"))
    assert_same(final_state(part), final_state(whole))


@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
@pytest.mark.parametrize("interrupted_at", [1, 5])
def test_a_sharded_resume_is_bit_identical(base, tmp_path, sample_rate, interrupted_at):
    if not sharded.available():
        pytest.skip("sharded checkpoints need torch 2.3")
    base = replace(
        base,
        checkpoint="sharded",
        data_mode="synthetic",
        num_classes=90,
        max_iter=3,
        log_every=1,
        centers_dtype="bf16",
        momentum_dtype="int8",
        sample_rate=sample_rate,
        loss_type="adaface",
    )
    losses = {}

    class Interrupted(Learner):
        def _leave_if_asked(self, *_):
            if self.progress.step == interrupted_at:
                raise Stopped(signal.SIGTERM)

    whole, part = (replace(base, work_path=str(tmp_path / name)) for name in ("whole", "part"))
    learner = trained(whole)
    with pytest.raises(Stopped):
        Interrupted.from_config(part).train()
    torch.manual_seed(99)
    resumed = trained(replace(part, resume="newest"))
    for one in (learner, resumed):
        losses[one.config.work_path] = {
            line["step"]: line["loss"] for line in metrics(one.config) if line["kind"] == "step"
        }
    assert losses[whole.work_path][6] == losses[part.work_path][6]
    assert resumed.head.draws == learner.head.draws == (6 if sample_rate < 1 else 0)
    assert_same(dict(resumed.backbone.state_dict()), dict(learner.backbone.state_dict()))
    for name, tensor in learner.head.local_state().items():
        assert_same({name: tensor}, {name: resumed.head.local_state()[name]})


def test_resuming_passes_over_a_damaged_checkpoint(base, caplog):
    if not sharded.available():
        pytest.skip("sharded checkpoints need torch 2.3")
    base = replace(base, checkpoint="sharded", save_every=2, keep=3)
    caplog.set_level("INFO")
    assert Learner.from_config(replace(base, resume="auto")).resumed is None
    assert "no checkpoint to resume, the training starts from the beginning" in caplog.text
    trained(base)
    newest = sharded.newest(f"{base.work_path}/sharded")
    rows = next(newest.glob("rank_*"))
    data = bytearray(rows.read_bytes())
    data[len(data) // 2] ^= 1  # the index is whole: only its checksum tells
    rows.write_bytes(data)
    learner = Learner.from_config(replace(base, resume="auto"))
    assert learner.resumed != newest and 0 < learner.progress.step < 10
    with pytest.raises(CheckpointError, match="damaged|checksum"):
        Learner.from_config(replace(base, resume=str(newest)))


def test_a_sharded_directory_is_taken_where_a_file_is(base, tmp_path):
    if not sharded.available():
        pytest.skip("sharded checkpoints need torch 2.3")
    learner = trained(replace(base, checkpoint="sharded", epochs=1, max_iter=2))
    weights = dict(learner.backbone.state_dict())
    new = replace(base, work_path=str(tmp_path / "new"), pth_path=str(learner.checkpoints.sharded))
    recognizer = Recognizer.load(new.pth_path, "cpu")
    assert recognizer.name == "tiny" and recognizer.architecture["embedding_size"] == 16
    assert_same(dict(recognizer.backbone.state_dict()), weights)
    assert_same(dict(Learner.from_config(replace(new, is_finetune=True)).backbone.state_dict()), weights)
    goes_on = Learner.from_config(new)
    assert goes_on.progress.step == 2
    assert torch.equal(goes_on.head.local_state()["momentum"], learner.head.local_state()["momentum"])
    with pytest.raises(CheckpointError, match="holds no whole sharded checkpoint"):
        Learner.from_config(replace(new, pth_path=str(tmp_path)))


def test_the_five_best_are_counted_in_the_same_pass(base):
    trained(replace(base, top5=True, epochs=1, data_mode="synthetic", num_classes=20, max_iter=3, log_every=1))
    steps = [line for line in metrics(base) if line["kind"] == "step"]
    assert len(steps) == 3 and all(0 <= line["accuracy"] <= line["accuracy_top5"] <= 1 for line in steps)
    without = trained(replace(base, epochs=1, max_iter=1))
    assert without.run_dir.name == "log_2"  # of a run of its own
    assert "accuracy" in (text := (without.run_dir / "metrics.jsonl").read_text()) and "accuracy_top5" not in text


def test_the_centers_may_have_a_rate_of_their_own(base):
    base = replace(base, epochs=1, max_iter=1, lr=1e-3, momentum_dtype="none", weight_decay=0.0)
    start = Learner.from_config(base).head.local_state()["weight"].clone()
    moved = [
        trained(replace(base, head_lr_factor=factor)).head.local_state()["weight"] - start for factor in (0.0, 1.0, 8.0)
    ]
    assert not moved[0].any() and moved[1].any()
    np.testing.assert_allclose(moved[2].numpy(), 8 * moved[1].numpy(), rtol=1e-3, atol=1e-6)
    with pytest.raises(ConfigError, match="at least 0"):
        Learner.from_config(replace(base, head_lr_factor=-1.0))


def test_a_head_that_does_not_fit_is_refused_before_it_is_allocated(base, caplog):
    base = replace(base, data_mode="synthetic", embedding_size=512, max_iter=1)
    with pytest.raises(ModelError, match="100,000,000,000 class centers need .* use more ranks"):
        Learner.from_config(replace(base, num_classes=10**11))
    assert "classes that fit" in caplog.text
    with pytest.raises(ModelError, match="class centers need"):
        Learner.from_config(replace(base, num_classes=1000, memory_reserve="1000TB"))
    with pytest.raises(ModelError, match="'much' is not a size"):
        Learner.from_config(replace(base, num_classes=1000, memory_reserve="much"))


def test_what_other_runs_saved_is_not_this_runs_to_delete(base):
    trained(replace(base, epochs=3, max_iter=1, keep=0, with_test=True))
    others = set()
    for path in Learner.from_config(base).checkpoints.models.iterdir():  # of another day: names hold the minute only
        others.add(path.rename(path.with_name(f"model_2020-01-01-00-00_{path.name.split('_', 2)[2]}")).name)
    assert len(others) in (1, 2)  # the best and the last
    learner = trained(replace(base, epochs=4, max_iter=1, keep=0, lr=2e-3))
    left = {path.name for path in learner.checkpoints.models.iterdir()}
    assert others <= left and len(left - others) <= 2
    goes_on = trained(
        replace(
            base, epochs=6, max_iter=1, keep=0, lr=2e-3, resume=str(learner.checkpoints.models / max(left - others))
        )
    )
    assert set(learner.checkpoints.saved) < set(goes_on.checkpoints.saved)
    assert others <= {path.name for path in learner.checkpoints.models.iterdir()}


def test_a_training_that_was_finished_is_said_to_be(base, caplog):
    caplog.set_level("INFO")
    trained(replace(base, epochs=1, max_iter=1))
    resumed = trained(replace(base, epochs=1, max_iter=1, resume="newest", run_dir=f"{base.work_path}/again"))
    assert resumed.progress.step == 1 and "raise it to go on" in caplog.text
    with pytest.raises(report.NothingTrained):
        report.write_report(Path(f"{base.work_path}/again"), Path(f"{base.work_path}/again"), "")


def test_a_folder_that_cannot_be_written_is_said_before_the_training(base, tmp_path):
    (tmp_path / "file").write_text("")
    for checkpoint in ("pth", "sharded") if sharded.available() else ("pth",):
        with pytest.raises(CheckpointError, match="no checkpoint can be written there .*--work_path"):
            trained(replace(base, work_path=str(tmp_path / "file"), run_dir=str(tmp_path), checkpoint=checkpoint))


def test_sigterm_saves_and_leaves(base, root):
    arguments = [
        f"--{k}={v}" for k, v in base.as_dict().items() if v != getattr(Config(), k) and not isinstance(v, list)
    ]
    process = subprocess.Popen(
        [sys.executable, "train.py", "--plugin=test/tiny_net.py", *arguments, "--epochs=1000", "--with_test=0"],
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log = f"{base.work_path}/log/metrics.jsonl"
    end = time.time() + 600
    while time.time() < end and not (os.path.exists(log) and '"step"' in open(log).read()):
        time.sleep(0.2)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert errors.splitlines()[-1].startswith("error: stopped by SIGTERM")
    saved = store.load_pth(store.newest(f"{base.work_path}/models"))
    steps = saved["training"]["step"]
    learner = Learner.from_config(replace(base, resume="auto", epochs=1000))
    assert learner.progress.step == steps > 0


def test_micro_batches_add_up_to_the_batch(base):
    """With batch norm frozen, two micro-batches of two are one batch of four."""

    class Frozen(Learner):
        def _train_epoch(self, *args):
            for module in self.backbone.modules():
                module.training = False
            self.backbone.train = lambda: None
            super()._train_epoch(*args)

    results = []
    for accumulate in (1, 2):
        learner = Frozen.from_config(replace(base, accumulate=accumulate, epochs=1, max_iter=1))
        learner.train()
        results.append(torch.cat([p.detach().flatten() for p in learner.backbone.parameters()]).double())
    start = torch.cat([p.detach().flatten() for p in Learner.from_config(base).backbone.parameters()]).double()
    update = (results[0] - start).norm()
    # fp32 sums in another order
    assert update > 0 and (results[0] - results[1]).norm() < 1e-5 * update


def test_fine_tuning_takes_the_backbone_alone(base, tmp_path):
    first = trained(base)
    path = store.newest(first.checkpoints.models)
    other = make_tiny_set(tmp_path / "other", classes=7)
    tuned = replace(base, data_path=str(other), pth_path=str(path), work_path=str(tmp_path / "tuned"))
    with pytest.raises(CheckpointError, match="4 classes.*--is_finetune"):
        Learner.from_config(tuned)
    learner = Learner.from_config(replace(tuned, is_finetune=True))
    assert_same(dict(learner.backbone.state_dict()), dict(first.backbone.state_dict()))
    assert learner.head.num_classes == 7 and learner.progress.step == 0
    learner.train()


def test_what_does_not_fit_is_one_line(base, tmp_path):
    learner = trained(replace(base, epochs=1))
    path = store.newest(learner.checkpoints.models)
    with pytest.raises(CheckpointError, match="--net_mode=tiny") as caught:
        Learner.from_config(replace(base, net_mode="ir", net_depth=18, resume=str(path)))
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        Learner.from_config(replace(base, resume="newest", work_path=str(tmp_path / "empty")))
    with pytest.raises(ConfigError, match="name it by --fs_name"):
        Learner.from_config(replace(base, fs_dir_for_save="models"))
    with pytest.raises(DataError, match="21"):
        Learner.from_config(replace(base, batch_size=21))
    with pytest.raises(ConfigError, match="multiple of 3"):
        Learner.from_config(replace(base, accumulate=3))
    with pytest.raises(ConfigError, match="--pth_path"):
        Learner.from_config(replace(base, is_finetune=True))
    for options in (dict(batch_size=1), dict(batch_size=2, accumulate=2)):
        with pytest.raises(ConfigError, match=f"no variance.*choose at least {2 * options['batch_size']}"):
            Learner.from_config(replace(base, **options))


def test_best_and_last_are_kept(base):
    learner = Learner.from_config(replace(base, keep=0, with_test=True))
    accuracies = iter([0.1, 0.5, 0.9, 0.7, 0.6])  # the first is the untrained net's
    learner._verify = lambda log, signals: setattr(learner.progress, "accuracy", next(accuracies))
    learner.config = replace(learner.config, epochs=4, max_iter=1)
    learner.steps_per_epoch = 1
    learner.train()
    assert sorted(p.name.rsplit("_", 1)[1] for p in learner.checkpoints.models.iterdir()) == [
        "0.60000.pth",
        "0.90000.pth",
    ]


def test_learning_rate_range_leaves_no_trace(base, tmp_path):
    learner = Learner.from_config(base)
    before = [p.detach().clone() for p in learner.backbone.parameters()]
    centers = learner.head.local_state()["weight"].clone()
    generators = torch.get_rng_state()
    rates, losses = learner.find_lr(1e-4, 1.0, steps=7, plot_path=str(tmp_path / "lr.png"))
    assert len(rates) == len(losses) and rates == sorted(rates) and len(rates) > 2
    assert all(torch.equal(a, b) for a, b in zip(before, learner.backbone.parameters()))
    assert torch.equal(centers, learner.head.local_state()["weight"])
    assert torch.equal(generators, torch.get_rng_state())
    assert learner.progress.step == 0


def test_infer_names_the_nearest(base):
    learner = Learner.from_config(base)
    faces = np.random.RandomState(0).randint(0, 256, (3, 112, 112, 3)).astype(np.uint8)
    bank = learner.recognizer.embed(faces)
    index, distance = learner.infer(list(faces[[2, 0]]), bank)
    assert index.tolist() == [2, 0] and float(distance.max()) < 1e-9
    index, _ = learner.infer(faces[:1], -bank[:1])
    assert index.tolist() == [-1]


def test_profile_leaves_a_trace_and_the_most_expensive_operations(base):
    if not hasattr(torch, "inference_mode"):  # torch 1.9
        with pytest.raises(DeviceError, match="--profile needs torch 1.9"):
            trained(replace(base, profile=True))
        return
    trained(replace(base, profile=True))
    folder = f"{base.work_path}/log/profile"
    with open(f"{folder}/trace.json") as file:
        events = json.load(file)["traceEvents"]
    assert any("convolution" in str(event.get("name")) for event in events)
    with open(f"{folder}/operations.txt") as file:
        table = file.read()
    assert "convolution" in table and "ProfilerStep" not in table


def test_the_run_says_which_fast_paths_were_on(base):
    trained(replace(base, epochs=1, max_iter=1, memory_format="channels_last", tf32=True))
    (run, *_) = metrics(base)
    assert run["fast_paths"] == {
        "opt_level": "O0", "memory_format": "channels_last", "tf32": False, "autotune": False, "static": False,
        "sgd": "sgd_plain", "head_op": "chunked", "copy_beside_compute": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(opt_level="O5"), ConfigError, "--opt_level 'O5': choose from auto, O0, O1, O2"),
        (dict(loss_scale="0"), ConfigError, "--loss_scale 0: give a positive number such as 128.0, or dynamic"),
        (dict(device_type="tpu"), DeviceError, "device 'tpu': choose from auto"),
    ],
)
def test_faults_of_precision_and_device_are_one_line(base, options, error, message):
    with pytest.raises(error, match=message) as caught:
        Learner.from_config(replace(base, **options))
    assert "\n" not in str(caught.value)


def test_a_device_that_vanishes_ends_the_command_in_one_line(base, root, tmp_path):
    """What CUDA's driver raises in the third step; the device is the emulation of one by its error alone."""
    code = f"""
import sys
import runtime.device
runtime.device.Cpu.driver_errors = runtime.device.Cuda.driver_errors
runtime.device.Cpu.tool = "nvidia-smi"
import learner
steps = []
def step(self, batches, lr, method=learner.Learner._train_step):
    steps.append(lr)
    if len(steps) == 3:
        raise RuntimeError("CUDA error: unspecified launch failure\\nCUDA kernel errors might be reported later")
    return method(self, batches, lr)
learner.Learner._train_step = step
import train
from runtime import log
sys.argv = ["train.py", "--device_type=cpu", "--data_path={base.data_path}", "--plugin=test/tiny_net.py",
            "--net_mode=tiny", "--embedding_size=16", "--batch_size=4", "--epochs=1", "--num_workers=0",
            "--with_test=0", "--tensorboard=0", "--work_path={base.work_path}"]
log.run_command(train.main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: cpu failed while it computed (CUDA error: unspecified launch failure): see whether nvidia-smi still "
        "lists it, and go on with --resume or on another --device_id"
    )
    assert metrics(base)[-1]["reason"] == "failed"


def test_static_mode_without_a_compiler_is_one_line(base, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DeviceError, match="static mode.*(C\\+\\+ compiler|torch 2.0)"):
        Learner.from_config(replace(base, static=True))


def test_a_run_that_is_not_finite_stops_and_keeps_what_was_good(base, tmp_path):
    base = replace(base, net_mode="mobilefacenet")
    good = trained(replace(base, epochs=1))
    kept = {path.name: path.read_bytes() for path in good.checkpoints.models.iterdir()}
    with pytest.raises(PrecisionError, match="not finite for the last .* steps.*--lr") as caught:
        trained(replace(base, lr=1e5, epochs=3, resume="newest", milestones=()))
    assert "first not finite: " in str(caught.value)
    assert {path.name: path.read_bytes() for path in good.checkpoints.models.iterdir()} == kept


def test_data_that_fails_in_the_middle_of_an_epoch_costs_no_step(base):
    learner = Learner.from_config(base)
    load = learner.dataset.load_into
    calls = []

    def failing(index, out_HWC):
        calls.append(index)
        if len(calls) > 12:
            raise DataError("the disk went away")
        return load(index, out_HWC)

    learner.dataset.load_into = failing
    with pytest.raises(DataError, match="the disk went away"):
        learner.train()
    resumed = Learner.from_config(replace(base, resume="newest"))
    assert resumed.progress.step == 3 and metrics(base)[-1]["reason"] == "failed"


def test_a_margin_of_ones_own_trains_resumes_and_is_evaluated(base, root, tmp_path, monkeypatch):
    """The example of docs/own_margin.md, run."""
    from config import load_plugins
    from head import margins

    monkeypatch.setattr(margins, "MARGINS", dict(margins.MARGINS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = (root / "docs" / "own_margin.md").read_text(encoding="utf-8")
    (tmp_path / "own_margin.py").write_text(text.split("```python\n")[1].split("```")[0])
    load_plugins([str(tmp_path / "own_margin.py")])
    learner = trained(replace(base, loss_type="half_way", margin=0.3, epochs=1))
    assert learner.head.margin == "half_way"
    again = Learner.from_config(replace(learner.config, resume="newest"))
    assert torch.equal(again.head.centers.weight, learner.head.centers.weight)
    assert set(again.evaluate()) == set(learner.evaluate())
    sys.modules.pop("own_margin")


@pytest.mark.parametrize("policy, operand", [("O0", torch.float32), ("bf16", torch.bfloat16)])
def test_the_head_s_products_have_the_policy_s_type_in_a_real_step(base, policy, operand, monkeypatch):
    """The default nets normalise in fp32 before the head: their embeddings' dtype must not decide."""
    if policy == "bf16" and not hasattr(torch, "autocast"):
        pytest.skip("torch 1.8 does not compute in bfloat16 on a cpu")
    from head.ops import chunked

    wanted, chosen = [], chunked.operand_dtype
    monkeypatch.setattr(chunked, "operand_dtype", lambda asked, *rest: wanted.append(asked) or chosen(asked, *rest))
    trained(replace(base, net_mode="mobilefacenet", opt_level=policy, epochs=1, max_iter=1))
    assert wanted and set(wanted) == {operand}
