"""The launchers with --device_type=npu. They find torch_npu as on an Ascend machine; here it is the emulated one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_set import make_tiny_set

pytestmark = pytest.mark.npu

STUBS = Path(__file__).with_name("stubs")
# One layout for both devices, because the CPU's kernels for the other sum in another order.
SMALL = (
    "--plugin=test/tiny_net.py",
    "--net_mode=tiny",
    "--num_workers=0",
    "--tensorboard=false",
    "--batch_size=4",
    "--log_every=1",
    "--memory_format=contiguous",
)


class Run:
    """What one launcher left behind."""

    def __init__(self, done, folder):
        self.status, self.text, self.folder = done.returncode, done.stdout + done.stderr, folder

    def records(self, kind):
        lines = (self.folder / "log" / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["kind"] == kind]

    @property
    def losses(self):
        return [line["loss"] for line in self.records("step")]

    @property
    def verified(self):
        return [(line["step"], line["accuracy"], line["threshold"], line["roc"]) for line in self.records("verify")]

    @property
    def checkpoint(self):
        return max((self.folder / "models").glob("*.pth"), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def launch(root, tmp_path_factory):
    """launch(launcher, *options, status=0, **environment) -> Run, in a folder of its own."""
    numbers = itertools.count()
    place = tmp_path_factory.mktemp("launchers")
    make_tiny_set(place / "set", classes=4, shots=4)

    def run(launcher, *options, status=0, **environment):
        work = place / f"run_{next(numbers)}"
        command = [
            "bash",
            f"test/{launcher}.sh",
            *SMALL,
            f"--data_path={place / 'set'}",
            f"--work_path={work}",
            f"--run_dir={work / 'log'}",
            *map(str, options),
        ]
        env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(STUBS), **environment}
        done = subprocess.run(
            command, cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == status, done.stdout + done.stderr
        return Run(done, work)

    return run


@pytest.fixture(scope="module")
def whole_on_cpu(launch):
    """Two epochs in fp32 on the CPU."""
    return launch("train_full_1p", "--device_type=cpu", "--opt_level=O0", "--epochs=2")


@pytest.fixture(scope="module")
def half_on_npu(launch):
    """The first of these epochs, on the emulated NPU."""
    return launch("train_full_1p", "--device_type=npu", "--opt_level=O0", "--epochs=1")


def test_train_full_1p_takes_the_same_steps_as_on_the_cpu(whole_on_cpu, half_on_npu):
    assert half_on_npu.records("run")[0]["device"]["name"] == "Ascend910B3"
    assert len(half_on_npu.losses) == 4 and half_on_npu.losses == whole_on_cpu.losses[:4]
    assert half_on_npu.verified == whole_on_cpu.verified[:2]
    assert "Final Performance images/sec" in half_on_npu.text


def test_its_checkpoint_is_not_tied_to_the_npu(half_on_npu):
    """A location of npu:0 in the file would keep plain torch.load from reading it where there is none."""
    assert b"npu:0" not in half_on_npu.checkpoint.read_bytes()


@pytest.mark.parametrize("device", ["npu", "cpu"])
def test_resuming_it_ends_the_same_training(launch, whole_on_cpu, half_on_npu, device):
    rest = launch(
        "train_full_1p", f"--device_type={device}", "--opt_level=O0", "--epochs=2", f"--resume={half_on_npu.checkpoint}"
    )
    assert rest.losses == whole_on_cpu.losses[4:]
    assert rest.verified[-1] == whole_on_cpu.verified[-1]


def test_fine_tuning_takes_the_backbone(launch, half_on_npu):
    tuned = launch(
        "train_finetune_1p", "--device_type=npu", "--epochs=1", "--max_iter=2", f"--pth_path={half_on_npu.checkpoint}"
    )
    before, after = half_on_npu.verified[-1], tuned.verified[0]
    assert tuned.records("run")[0]["opt_level"] == "O2"  # what is the default on an NPU
    assert tuned.records("verify")[0]["untrained"] and abs(before[2] - after[2]) < 0.02
    assert len(tuned.losses) == 2


def test_train_full_8p_over_hccl_takes_the_same_steps_as_over_gloo(launch):
    options = ("--opt_level=O0", "--epochs=1", "--max_iter=3")
    npu = launch("train_full_8p", "--device_type=npu", *options, RANK_SIZE="2")
    cpu = launch("train_full_8p", "--device_type=cpu", *options, RANK_SIZE="2")
    assert npu.records("run")[0]["world_size"] == 2 and npu.records("run")[0]["device"]["kind"] == "npu"
    assert len(npu.losses) == 3 and npu.losses == cpu.losses and npu.verified == cpu.verified


def test_train_full_8p_in_mixed_precision(launch):
    run = launch("train_full_8p", "--device_type=npu", "--epochs=1", "--loss_scale=dynamic", RANK_SIZE="2")
    assert run.records("run")[0]["opt_level"] == "O2" and len(run.losses) == 4
    assert all(line["loss"] is not None for line in run.records("step"))


def test_train_eval_8p_gives_what_training_gave(launch, half_on_npu):
    run = launch(
        "train_eval_8p",
        "--device_type=npu",
        f"--pth_path={half_on_npu.checkpoint}",
        "--opt_level=O0",
        "--val_targets=lfw",
        RANK_SIZE="2",
    )
    assert run.verified[0][1:] == half_on_npu.verified[-1][1:]


@pytest.mark.parametrize("policy", ["O1", "bf16_master"])
def test_train_performance_1p_without_data(launch, policy):
    run = launch(
        "train_performance_1p",
        "--device_type=npu",
        "--data_mode=synthetic",
        "--num_classes=50",
        f"--opt_level={policy}",
        "--epochs=1",
        "--max_iter=4",
    )
    assert run.records("run")[0]["opt_level"] == policy
    assert run.records("window")[0]["images_per_s"] > 0 and len(run.losses) == 4


def test_more_ranks_than_npus(launch):
    run = launch("train_full_8p", "--device_type=npu", RANK_SIZE="3", status=1)
    assert len(run.text.splitlines()) == 1 and run.text.startswith("error: 3 ranks on this machine, but 2 npu devices")


def test_an_npu_that_is_not_there(launch):
    run = launch("train_full_1p", "--device_type=npu:5", status=1)
    assert run.text.splitlines()[-1].startswith("error:") and "npu:5 does not exist" in run.text


def test_an_operator_that_cann_lacks_ends_the_launcher(launch):
    run = launch("train_full_1p", "--device_type=npu", "--epochs=1", NPU_SIM_DENY="aten::_prelu_kernel", status=1)
    assert "Could not run 'aten::_prelu_kernel'" in run.text and "Final Performance" not in run.text
