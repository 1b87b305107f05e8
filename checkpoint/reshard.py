"""A sharded checkpoint rewritten for another number of ranks, or as one `.pth`, without ever holding a table in memory.

Loading does not need the first: any number of ranks reads any checkpoint. It pays where each rank should find its rows
in one file of its own. The second is for exchange:

    python -m checkpoint.reshard work_space/sharded model.pth
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from checkpoint import layout, sharded, store
from runtime.errors import CheckpointError
from runtime.log import Parser, run_command, setup_logging
from runtime.shard import RowShard

log = logging.getLogger(__name__)

ROWS = "rows."


def find(path) -> Path:
    """The checkpoint at `path`, which is one itself or a folder of them (then its newest whole one)."""
    if not str(path):
        raise CheckpointError("the path of the sharded checkpoint is empty: is a variable of your shell not set?")
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder: pass a sharded checkpoint or the folder of them")
    if (path / layout.INDEX).exists():
        return path
    found = layout.newest(path)
    if found is None:
        raise CheckpointError(f"{path}: holds no whole sharded checkpoint: pass one, or the folder of them")
    return found


def convert(source, folder, ranks: int, feature: str = "") -> Path:
    """Writes the checkpoint `source` for `ranks` ranks as a new checkpoint in `folder`; returns its path.

    feature: only row tables whose names contain it are cut anew, the others keep their files. At most two pieces
    (32 MiB each) are held at a time. Raises CheckpointError; `folder` then holds nothing new.
    """
    source = Path(source)
    index = layout.read_index(source)
    tables = [name for name in index.tensors if name.startswith(ROWS) and feature in name[len(ROWS) :]]
    if not tables:
        raise CheckpointError(f"{source}: no row table with {feature!r} in its name: leave the name out to take all")
    if not 1 <= ranks <= layout.MOST_RANKS:
        raise CheckpointError(f"{ranks} ranks: give 1 to {layout.MOST_RANKS}")
    # A rank that is new has no generators; those of ranks that go are left out.
    local = (index.local + [None] * ranks)[:ranks]
    kept = {
        name: stored
        for name, stored in index.tensors.items()
        if not (name.startswith("rank") and int(name.split(".")[0][4:]) >= ranks)
    }
    temporary, final = layout.begin(folder, source.name.split("-", 1)[-1])
    try:
        with layout.PieceReader(source) as reader:
            parts = [_write_rank(temporary, rank, ranks, kept, tables, reader) for rank in range(ranks)]
        tensors = {
            name: layout.Stored(stored.dtype, stored.shape, [piece for part in parts for piece in part.get(name, [])])
            for name, stored in kept.items()
        }
        layout.write_index(temporary, layout.Index(ranks, index.values, local, tensors))
        layout.read_index(temporary)
        layout.publish(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{folder}: not converted ({error.strerror or error}): free space") from error
        raise
    return final


def _write_rank(folder, rank: int, ranks: int, tensors: dict, tables: list, reader) -> dict:
    """Writes one rank's file; name -> the pieces that went into it."""
    written = {}
    with layout.RankFile(folder, rank) as file:
        for number, (name, stored) in enumerate(tensors.items()):
            if name in tables:
                shard = RowShard.of(stored.rows, rank, ranks)
            elif number % ranks == rank:  # not cut: one rank has it all
                shard = RowShard.of(stored.rows)
            else:
                continue
            for piece in stored.pieces:
                start, stop = max(piece.row, shard.start), min(piece.row + piece.rows, shard.stop)
                if start < stop or not stored.rows:
                    rows = sharded.piece_rows(reader, stored, piece)[start - piece.row : stop - piece.row]
                    written.setdefault(name, []).append(file.append(start, rows if stored.shape else rows[0]))
    return written


def to_pth(source, path) -> None:
    """Writes the checkpoint `source` of a Learner as one `.pth` that training can go on from.

    The class centers [C, D] become {"head": {"kernel": [D, C]}}, their momentum goes where `.pth` files keep it (one
    in 8 bits stays out: it starts anew). Tables pass through files beside `path`, as large as themselves in float32,
    and never through memory.
    """
    if not str(path):
        raise CheckpointError("the path of the .pth to write is empty: is a variable of your shell not set?")
    source, path = Path(source), Path(path)
    index = layout.read_index(source)
    weight, momentum = index.tensors.get(ROWS + "weight"), index.tensors.get(ROWS + "momentum")
    if weight is None or len(weight.shape) != 2:
        raise CheckpointError(f"{source}: holds no class centers (table 'weight'): pass a training checkpoint")
    if momentum is not None and ROWS + "momentum_scale" in index.tensors:
        log.warning("%s: its momentum in 8 bits stays out of %s", source, path)
        momentum = None
    try:
        with layout.PieceReader(source) as reader, ExitStack() as stack:
            small = {
                name: sharded.read_whole(reader, entry)
                for name, entry in index.tensors.items()
                if not name.startswith(ROWS)
            }
            state = layout.decode(index.values, small)
            weight_CW = _read_aside(reader, weight, path.parent, stack)
            # What the table holds beyond the embedding's width is a bias.
            width = state.get("meta", {}).get("embedding_size", weight.shape[1])
            head = {"kernel": weight_CW[:, :width].t()}
            if "training" in state:
                bias = weight_CW[:, width:].t() if width < weight.shape[1] else None
                momentum = None if momentum is None else _read_aside(reader, momentum, path.parent, stack).t()
                state["training"]["head"] = {"momentum": momentum, "bias": bias, **state.pop("head")}
                state["training"]["rng"] = [layout.decode(tree, small)["rng"] for tree in index.local]
            store.save_pth(path, {**state, "head": head})
    except OSError as error:
        raise CheckpointError(f"{path}: not written ({error.strerror or error}): choose a folder with space") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source}: no checkpoint of this project's training ({error!r}): pass one") from error


def _read_aside(reader, stored, folder, stack):
    """The table as float32, mapped from a file in `folder` that goes away with the stack."""
    file = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix="."))
    # Reserved, not only sized: a write through the mapping to a full disk would kill the process.
    os.posix_fallocate(file.fileno(), 0, max(1, 4 * stored.shape[0] * stored.shape[1]))
    table = torch.from_file(file.name, shared=True, size=stored.shape[0] * stored.shape[1])
    return sharded.read_whole(reader, stored, table.reshape(stored.shape))


def main(arguments=None) -> None:
    parser = Parser("python -m checkpoint.reshard", description="A sharded checkpoint as one .pth")
    parser.add_argument("source", help="a sharded checkpoint, or the folder of them (then the newest)")
    parser.add_argument("path", help="the .pth file to write")
    options = parser.parse_args(arguments)
    source = find(options.source)
    to_pth(source, options.path)
    log.info("%s -> %s", source, options.path)


if __name__ == "__main__":
    setup_logging()
    run_command(main)
