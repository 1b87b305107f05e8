"""Sharded checkpoints: any number of ranks to any other, errors on all ranks alike, kills at any moment, memory."""

from __future__ import annotations

import multiprocessing
import random
import time

import pytest
import torch
import workers_checkpoint as workers
from ranks import run_ranks

from checkpoint import layout, sharded
from runtime.dist import ALONE
from runtime.errors import CheckpointError
from runtime.shard import RowShard

pytestmark = pytest.mark.skipif(not sharded.available(), reason=f"no sharded checkpoints on torch {torch.__version__}")


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    # 4 rows and a bit: shards of N and of M ranks cut each other's pieces
    whole, layout.PIECE_BYTES = layout.PIECE_BYTES, 100
    yield
    layout.PIECE_BYTES = whole


def run(fn, size, *args) -> list:
    return run_ranks(fn, size, *args) if size > 1 else [fn(ALONE, *args)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """Ranks that saved -> the checkpoint's path."""
    folders = {size: str(tmp_path_factory.mktemp("saved")) for size in (1, 2, 3, 4)}
    return {n: run(workers.save_one, n, folder, 7, n % 2 == 0, 100)[0] for n, folder in folders.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_saved_on_any_number_of_ranks_loads_on_any_other(saved, size):
    for rank, answers in enumerate(run(workers.load_all, size, saved, 7)):
        for saved_by, (right, local) in answers.items():
            assert right, f"{saved_by} ranks to {size}, rank {rank}"
            assert local == (rank if rank < saved_by else None)


def test_every_rank_wrote_its_own_rows(saved):
    index = layout.read_index(saved[3])
    for rank in range(3):
        shard = RowShard.of(workers.CLASSES, rank, 3)
        own = [p for p in index.tensors["rows.weight"].pieces if p.file == f"rank_{rank:05d}.bin"]
        assert (own[0].row, own[-1].row + own[-1].rows) == (shard.start, shard.stop)


def test_another_table_is_one_line_on_every_rank(saved):
    classes, width = workers.CLASSES, workers.WIDTH
    expected = {
        ("weight", 900, width, torch.float32): ["[1003, 6]", "[900, 6]", "as many classes"],
        ("weight", classes, 7, torch.float32): ["[1003, 6]", "[1003, 7]", "embedding size"],
        ("bias", classes, 1, torch.float32): ["bias", "not in this checkpoint"],
        ("momentum", classes, 1, torch.float32): ["torch.uint8", "same dtype"],
    }
    for messages in run_ranks(workers.load_errors, 2, saved[2], list(expected)):
        assert len(messages) == len(expected)
        for message, words in zip(messages, expected.values()):
            assert all(word in message for word in [saved[2], *words]) and "\n" not in message


def test_rows_convert_between_floating_dtypes(saved):
    shard = RowShard.of(workers.CLASSES)
    weight = torch.zeros(workers.CLASSES, workers.WIDTH, dtype=torch.float64)
    sharded.load(saved[2], {"weight": (weight, shard)})
    assert torch.equal(weight, workers.table(7).float().double())


def test_a_full_disk_on_one_rank_fails_on_all_and_leaves_the_last_checkpoint(tmp_path):
    for message, names in run_ranks(workers.save_with_a_full_disk_on_rank_1, 2, str(tmp_path)):
        assert "rank 1: No space left on device" in message and "\n" not in message
        assert names == ["000001-step_1"]


def test_a_damaged_newest_is_passed_over_on_all_ranks(tmp_path):
    with sharded.Saver(tmp_path, keep=3) as saver:
        for step in (1, 2, 3):
            saver.save(f"step_{step}", workers.state_of(step), workers.rows_of(ALONE, step))
    (tmp_path / "000003-step_3" / "index.json").write_text("{")
    path = tmp_path / "000002-step_2"
    last = layout.read_index(path).tensors["rows.weight"].pieces[-1]  # rows that only rank 1 reads
    with open(path / last.file, "r+b") as file:
        file.seek(last.start + last.bytes - 1)
        file.write(b"?")
    for found in run_ranks(workers.load_newest_one, 2, str(tmp_path), 1):
        assert found == ("000001-step_1", 1, True)


def test_ranks_agree_when_minutes_have_passed():
    # rank 1 of 2 sees 4 s a step: 60 s have passed for it at step 15, which is asked at 20; rank 0 would say 40
    answers = run_ranks(workers.due_steps, 2, 2.0, 1.0, 0)
    assert answers[0] == answers[1] == [20, 40, 60, 80, 100]
    assert workers.due_steps(ALONE, 2.0, 1.0, 0) == [40, 80]
    assert workers.due_steps(ALONE, 2.0, 0, 30) == [30, 60, 90]
    assert workers.due_steps(ALONE, 2.0, 0, 0) == []


def test_killed_at_random_moments_it_resumes_from_a_whole_checkpoint(tmp_path):
    chance = random.Random(0)
    saved = 0
    for _round in range(5):
        process, pipe = _start(workers.save_until_killed, str(tmp_path))
        assert pipe.recv() >= saved, "a checkpoint that was reported as whole is lost"
        for _checkpoint in range(chance.randrange(1, 8)):  # a moment chosen by progress, not by the clock
            saved = pipe.recv()
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.join()
        try:
            while True:
                saved = pipe.recv()
        except EOFError:
            pass
        path = sharded.newest(tmp_path)
        step = int(path.name.split("_")[1])
        assert step >= saved
        assert workers.load_one(ALONE, path, step) == (True, None)


def test_loading_needs_the_shard_and_a_tenth(tmp_path, monkeypatch):
    classes, width = 500_000, 64
    monkeypatch.setattr(layout, "PIECE_BYTES", 4 << 20)  # as 32 MiB are to ten million classes
    with sharded.Saver(tmp_path, background=False) as saver:
        rows = torch.arange(classes, dtype=torch.float32)[:, None].expand(classes, width)
        saver.save("big", {}, {"weight": (rows, RowShard.of(classes))})
    process, pipe = _start(workers.load_a_big_one, str(sharded.newest(tmp_path)), classes, width)
    more, last = pipe.recv()
    process.join()
    assert last == classes - 1
    assert 0 <= more <= 0.1 * classes * width * 4


def _start(fn, *args):
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=fn, args=(*args, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def test_what_ranks_hold_must_be_whole(tmp_path):
    with pytest.raises(CheckpointError, match="10 rows|row 0"):
        with sharded.Saver(tmp_path) as saver:
            saver.save("gap", {}, {"weight": (torch.zeros(5, 2), RowShard(5, 10, 20))})
    assert list(tmp_path.iterdir()) == []
