"""What a run says when it begins."""

from __future__ import annotations

import pytest

from runtime.opening import opening_lines, usual_lr

pytestmark = pytest.mark.core
RUN = dict(
    network="ir_se_100",
    parameters=65_502_000,
    embedding_size=512,
    loss="arcface m 0.5, s 64",
    data="./data/faces_emore",
    images=5_822_653,
    classes=85_742,
    verified=("lfw", "cfp_fp"),
    batch_size=2560,
    ranks=8,
    accumulate=1,
    epochs=(0, 20),
    steps_per_epoch=2274,
    device="npu:0 Ascend910",
    precision="O2",
    lr=0.01,
    lr_course="x 0.1 from epochs 12, 15, 18 on",
    weights="",
    checkpoints="work_space/models",
    run_dir="test/output/run",
)


def test_a_run_of_eight_ranks():
    assert opening_lines(**RUN) == [
        "network  ir_se_100, 65.50 million parameters, embedding 512; arcface m 0.5, s 64",
        "weights  new, random",
        "data     ./data/faces_emore: 5,822,653 images of 85,742 classes; verified on lfw, cfp_fp",
        "batch    2,560 images an update: 8 ranks x 320",
        "steps    2,274 an epoch, epochs 0 to 19: 45,480 in all",
        "device   npu:0 Ascend910, O2",
        "rate     0.01, x 0.1 from epochs 12, 15, 18 on; "
        "the usual rule (0.1 for 1,024 images, in proportion) gives 0.25",
        "output   checkpoints in work_space/models, metrics and report in test/output/run",
    ]


def test_micro_batches_a_resumed_run_and_one_that_is_done():
    lines = opening_lines(
        **{**RUN, "ranks": 1, "accumulate": 4, "batch_size": 64, "epochs": (3, 4), "verified": (), "weights": "x.pth"}
    )
    assert lines[1] == "weights  x.pth" and lines[2].endswith("verified on nothing")
    assert lines[3] == "batch    64 images an update: 1 rank x 16 x 4 micro-batches"
    assert lines[4] == "steps    2,274 an epoch, epochs 3 to 3: 2,274 in all"
    assert "gives 0.00625" in lines[6]
    assert opening_lines(**{**RUN, "epochs": (20, 20)})[4].endswith("no epoch left: 0 in all")


def test_the_usual_rule_is_the_published_one():
    """arcface_torch: 0.1 for 128 images on each of 8 GPUs, 0.4 for 512 on each."""
    assert usual_lr(128 * 8) == pytest.approx(0.1) and usual_lr(512 * 8) == pytest.approx(0.4)
