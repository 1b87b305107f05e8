"""Real faces in files that other tools wrote."""

from __future__ import annotations

import json

import pytest

from config import Config
from learner import Learner

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    "name, batch, classes, images",
    [
        ("lfw_small", 8, 260, 2579),
        ("tipc/small_dataset", 4, 10, 10),
        ("adaface_mini_rec", 4, 2, 8),
    ],
)
def test_it_trains_a_few_steps(shared, tmp_path, name, batch, classes, images):
    config = Config(
        data_path=str(shared / "real" / name), batch_size=batch, net_mode="mobilefacenet", embedding_size=32, epochs=1,
        max_iter=2, lr=0.01, log_every=1, device_type="cpu", with_test=False, num_workers=0, tensorboard=False,
        work_path=str(tmp_path),
    )  # fmt: skip
    Learner.from_config(config).train()
    lines = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert (lines[0]["num_classes"], lines[0]["images"]) == (classes, images)
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2]
