"""What spawned ranks and killed processes of the checkpoint tests run."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from checkpoint import layout, lock, sharded
from runtime.dist import ALONE
from runtime.errors import CheckpointError
from runtime.shard import RowShard

CLASSES, WIDTH = 1003, 6


def table(step: int, width: int = WIDTH) -> torch.Tensor:
    """[CLASSES, width] whole numbers that name their step, row and column."""
    rows = torch.arange(CLASSES, dtype=torch.float64)[:, None]
    return step * 1e7 + rows * 1e3 + torch.arange(width, dtype=torch.float64)


def state_of(step: int) -> dict:
    """The part that all ranks have alike: keys with dots, whole-number keys, 0-dim and empty tensors."""
    return {
        "model": {"layer.0.weight": torch.full((64, 33), float(step)), "steps": torch.tensor(step)},
        "optimizer": {0: {"momentum": torch.full((5,), -float(step))}, "empty": torch.empty(0, 3)},
        "position": [step, (0.5, None, "text", True)],
    }


def rows_of(world, step: int) -> dict:
    shard = RowShard.of(CLASSES, world.rank, world.size)
    weight = table(step)[shard.slice].float()
    return {"weight": (weight, shard), "momentum": ((table(step, 1) % 251)[shard.slice].to(torch.uint8), shard)}


def save_one(world, folder, step: int, background: bool, piece_bytes: int) -> str:
    layout.PIECE_BYTES = piece_bytes
    state, rows = state_of(step), rows_of(world, step)
    with sharded.Saver(folder, world, background=background) as saver:
        saver.save(f"step_{step}", state, rows, local={"rank": world.rank, "generator": torch.full((3,), world.rank)})
        if background:  # the copy is made: what training does now must not reach the file
            for tensor in (*state["model"].values(), *(tensor for tensor, _shard in rows.values())):
                tensor.zero_()
    world.barrier()
    return str(sharded.newest(folder))


def load_all(world, paths: dict, step: int) -> dict:
    return {saved_by: load_one(world, path, step) for saved_by, path in paths.items()}


def load_one(world, path, step: int) -> tuple:
    """(whether every number of this rank is right, the local state's rank, or None)."""
    rows = {name: (torch.zeros_like(tensor), shard) for name, (tensor, shard) in rows_of(world, step).items()}
    state, local = sharded.load(path, rows, world)
    right = same(state, state_of(step))
    for name, (tensor, _shard) in rows_of(world, step).items():
        right = right and torch.equal(rows[name][0], tensor)
    if local is not None:
        right = right and torch.equal(local["generator"], torch.full((3,), local["rank"]))
    return right, None if local is None else local["rank"]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


def load_errors(world, path, cases: list) -> list:
    """The message for each (name, total, width, dtype) that the checkpoint does not hold."""
    messages = []
    for name, total, width, dtype in cases:
        shard = RowShard.of(total, world.rank, world.size)
        try:
            sharded.load(path, {name: (torch.zeros(shard.rows, width, dtype=dtype), shard)}, world)
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def save_with_a_full_disk_on_rank_1(world, folder) -> tuple:
    """(the error that this rank sees, what the folder holds afterwards)."""

    def append(self, row, tensor):
        raise OSError(28, "No space left on device")

    with sharded.Saver(folder, world) as saver:
        saver.save("step_1", state_of(1), rows_of(world, 1))
    if world.rank == 1:
        layout.RankFile.append = append
    saver = sharded.Saver(folder, world)
    saver.save("step_2", state_of(2), rows_of(world, 2))
    try:
        saver.wait()
    except CheckpointError as error:
        message = str(error)
    world.barrier()
    return message, sorted(path.name for path in Path(folder).iterdir())


def load_newest_one(world, folder, step: int) -> tuple:
    rows = {name: (torch.zeros_like(tensor), shard) for name, (tensor, shard) in rows_of(world, step).items()}
    path, state, _local = sharded.load_newest(folder, rows, world)
    return Path(path).name, state["position"][0], torch.equal(rows["weight"][0], rows_of(world, step)["weight"][0])


def due_steps(world, seconds_a_step: float, minutes: float, steps: int) -> list:
    now = [0.0]
    every = sharded.SaveEvery(steps, minutes, world, clock=lambda: now[0])
    due = []
    for step in range(1, 101):
        now[0] += seconds_a_step * (1 + world.rank)  # the ranks' clocks disagree
        if every.due(step):
            due.append(step)
    return due


def save_until_killed(folder, pipe) -> None:
    """Resumes from the newest checkpoint and goes on saving; sends the step it resumed, then each that is whole."""
    torch.set_num_threads(1)
    layout.PIECE_BYTES = 1 << 12
    found = sharded.load_newest(folder, {})
    start = 0 if found is None else found[1]["position"][0]
    pipe.send(start)
    saver = sharded.Saver(folder, published=lambda path: pipe.send(int(path.name.split("_")[1])))
    for step in range(start + 1, start + 10000):
        saver.save(f"step_{step}", state_of(step), rows_of(ALONE, step))


def load_a_big_one(path, classes: int, width: int, pipe) -> None:
    """Sends by how many bytes loading raised the peak of memory above the tensor to be filled."""
    torch.set_num_threads(1)
    tensor = torch.ones(classes, width)
    sharded.load(path, {})  # so that what torch imports at the first load is not counted
    before = peak_bytes()
    sharded.load(path, {"weight": (tensor, RowShard.of(classes))})
    pipe.send((peak_bytes() - before, int(tensor[-1, 0])))


def peak_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def hold(folder, pipe) -> None:
    with lock.held(folder):
        pipe.send("held")
        time.sleep(1000)
