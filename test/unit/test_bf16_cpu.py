"""bf16 on the CPU, for verification and training: as near to fp32 as bfloat16's rounding is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_set import make_tiny_set

import config as options
import evaluate
from checkpoint import store
from config import Config, replace
from learner import Learner
from recognizer import Recognizer
from runtime.device import Device
from runtime.dist import ALONE
from runtime.errors import DeviceError
from runtime.precision import POLICIES

pytestmark = pytest.mark.core
CPU = Device("cpu")
BF16 = ("bf16", "bf16_master")
# One rounding to bfloat16 is wrong by at most 2**-9 of the value. A MobileFaceNet rounds at each of its 50 convolutions
# and as many activations; independent errors add up as sqrt(100) * 2**-9 = 0.02 of the embedding's length, and what is
# not independent is left a factor of three.
LARGEST_ERROR = 3 * 100**0.5 * 2**-9
# A loss of scale 64 moves by 64 times what a cosine moves by; the mean over the batch less.
LARGEST_LOSS_ERROR = 64 * LARGEST_ERROR


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_set(tmp_path_factory.mktemp("tiny"), pairs=40)


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    return Config(
        net_mode="mobilefacenet",
        embedding_size=32,
        data_path=str(tiny),
        batch_size=10,
        epochs=2,
        lr=1e-3,
        work_path=str(tmp_path_factory.mktemp("work")),
        device_type="cpu",
        num_workers=0,
        log_every=1,
        with_test=False,
        tensorboard=False,
    )


@pytest.fixture(scope="module")
def trained(base):
    """A checkpoint of four fp32 steps, and their losses."""
    Learner.from_config(base).train()
    return store.newest(f"{base.work_path}/models"), losses(base)


def losses(config):
    with open(f"{config.work_path}/log/metrics.jsonl") as file:
        return [line["loss"] for line in map(json.loads, file) if line["kind"] == "step"]


@pytest.fixture(autouse=True)
def bf16_is_here():
    if not CPU.supports(torch.bfloat16):
        pytest.skip(f"torch {torch.__version__} does not compute in bfloat16 on this cpu")


@pytest.mark.parametrize("policy", BF16)
@pytest.mark.slow
def test_embeddings_are_near_those_of_fp32(base, trained, policy):
    faces = np.random.RandomState(0).randint(0, 256, (12, 112, 112, 3)).astype(np.uint8)
    emb_ND = {}
    for name in ("O0", policy):
        emb_ND[name] = Recognizer.load(trained[0], "cpu", opt_level=name).embed(faces)
        assert emb_ND[name].dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(emb_ND[name], axis=1), 1, rtol=1e-6)
    error_N = np.linalg.norm(emb_ND[policy] - emb_ND["O0"], axis=1)
    assert 0 < error_N.max() < LARGEST_ERROR


@pytest.mark.parametrize("policy", BF16)
@pytest.mark.slow
def test_verification_decides_as_fp32_does_but_for_the_pairs_at_the_threshold(base, trained, tiny, tmp_path, policy):
    found = {}
    for name in ("O0", policy):
        config = options.parse_arguments(
            [f"--pth_path={trained[0]}", f"--data_path={tiny}", "--device_type=cpu", f"--opt_level={name}",
             f"--output={tmp_path / name}"], training=False)  # fmt: skip
        found[name] = evaluate.evaluate(config, evaluate.find_sets(config), CPU, ALONE)["lfw"]
        facts = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert facts["opt_level"] == name
    # 40 pairs in ten folds: one pair is 0.025
    assert abs(found[policy].accuracy - found["O0"].accuracy) <= 2 * 0.025 + 1e-9


@pytest.mark.parametrize("policy", BF16)
@pytest.mark.slow
def test_training_follows_fp32(base, trained, tmp_path, policy):
    """The same batches from the same weights: first the same loss but for rounding, then learning beside fp32."""
    config = replace(base, opt_level=policy, work_path=str(tmp_path))
    learner = Learner.from_config(config)
    learner.train()
    half, exact = losses(config), trained[1]
    assert len(half) == len(exact) == 4
    assert 0 < abs(half[0] - exact[0]) < LARGEST_LOSS_ERROR
    assert all(np.isfinite(half)) and learner.precision.skipped == 0 and learner.precision.scale == 1
    saved = store.load_pth(store.newest(f"{config.work_path}/models"))
    assert {t.dtype for t in saved["model"].values()} == {torch.float32, torch.int64}


def test_a_machine_without_bf16_says_so_in_one_line(base, monkeypatch):
    monkeypatch.setattr(Device, "supports", lambda self, dtype: dtype != torch.bfloat16)
    for policy in BF16:
        with pytest.raises(
            DeviceError,
            match=f"^opt_level {policy} computes in bfloat16, which cpu cannot train in "
            "with torch .*: choose from O0, O1, O2, fp16 here, or another device$",
        ):
            Learner.from_config(replace(base, opt_level=policy))
    assert POLICIES["bf16"].compute == torch.bfloat16
