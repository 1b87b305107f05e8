"""N ranks of b images are one rank of N * b; every rank verifies and saves the same network."""

from __future__ import annotations

import json

import numpy as np
import pytest
import workers_learner as workers
from ranks import run_ranks
from tiny_set import make_tiny_set

from checkpoint import sharded, store
from config import Config, replace
from runtime.dist import ALONE

pytestmark = pytest.mark.core


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_one_rank_in_float64(size):
    losses, weights, kernel = workers.train_in_float64(ALONE)
    results = run_ranks(workers.train_in_float64, size)
    for rank_losses, rank_weights, _ in results:
        np.testing.assert_allclose(rank_losses, losses, rtol=1e-11)
        np.testing.assert_allclose(rank_weights, weights, rtol=1e-12, atol=1e-11)
    # the kernel is exported in fp32: one unit of rounding
    np.testing.assert_allclose(results[0][2], kernel, rtol=0, atol=1e-7)


def test_two_ranks_train_verify_save_and_resume(tmp_path):
    config = Config(
        net_mode="mobilefacenet",
        embedding_size=16,
        data_path=str(make_tiny_set(tmp_path / "set")),
        batch_size=4,
        epochs=1,
        lr=1e-5,  # batch norm over two images blows up with more
        work_path=str(tmp_path / "work"),
        device_type="cpu",
        num_workers=0,
        tensorboard=False,
        log_every=1,
    )
    results = run_ranks(workers.run_learner, 2, config)
    assert [step for step, _, _ in results] == [5, 5]
    np.testing.assert_array_equal(results[0][1], results[1][1])
    np.testing.assert_array_equal(results[0][2], results[1][2])
    lines = [json.loads(line) for line in open(tmp_path / "work/log/metrics.jsonl")]
    assert lines[0]["world_size"] == 2 and lines[-1]["kind"] == "end"
    saved = store.load_pth(store.newest(tmp_path / "work/models"))
    assert len(saved["training"]["rng"]) == 2
    # on as many ranks, on more and on one
    for size in (2, 3, 1):
        resumed = run_ranks(workers.resume_learner, size, replace(config, batch_size=6 if size == 3 else 4))
        assert resumed[0][0] == (3 if size == 3 else 5)  # an epoch of larger batches has fewer steps
        np.testing.assert_array_equal(resumed[0][1], saved["head"]["kernel"].numpy())


def test_a_sharded_run_goes_on_with_another_number_of_ranks(tmp_path):
    if not sharded.available():
        pytest.skip("sharded checkpoints need torch 2.3")
    config = Config(
        net_mode="mobilefacenet",
        embedding_size=16,
        data_path=str(make_tiny_set(tmp_path / "set")),
        batch_size=6,
        epochs=1,
        lr=0.002,
        work_path=str(tmp_path / "work"),
        device_type="cpu",
        num_workers=0,
        tensorboard=False,
        log_every=1,
        with_test=False,
        checkpoint="sharded",
        save_every=2,
    )
    run_ranks(workers.run_learner, 2, config)
    kernels = [run_ranks(workers.resume_learner, size, config)[0] for size in (1, 2, 3)]
    assert [step for step, _ in kernels] == [3, 3, 3]
    for _, kernel in kernels[1:]:
        np.testing.assert_array_equal(kernel, kernels[0][1])


@pytest.mark.parametrize("images, position", [(6, 3), (2, 1)])
def test_data_that_fails_on_one_of_two_ranks_costs_no_step(tmp_path, images, position):
    config = Config(
        net_mode="mobilefacenet", embedding_size=16, data_path=str(make_tiny_set(tmp_path / "set")), batch_size=4,
        epochs=1, lr=1e-5, work_path=str(tmp_path / "work"), device_type="cpu", num_workers=0, tensorboard=False,
        with_test=False,
    )  # fmt: skip
    found = run_ranks(workers.run_with_failing_data, 2, config, images)
    assert found == [("rank 1: the disk went away", position, position)] * 2
    saved = store.load_pth(store.newest(tmp_path / "work/models"))
    assert saved["training"]["step"] == saved["training"]["step_in_epoch"] == position
    step, _ = run_ranks(workers.resume_learner, 2, config)[0]
    assert step == position
