"""Full checkpoints of a run on any number of ranks, by torch.distributed.checkpoint (torch 2.3 or newer).

Each rank writes the rows of the big tables (class centers, momentum) that it holds, and a share of what all ranks have
alike; N ranks write, M ranks read. torch plans who reads what and sees to it that all ranks succeed or fail together;
the bytes and the index lie on disk as checkpoint/layout.py says, because torch's own files are pickles, which a
stranger's checkpoint must not be.

Saving copies the state to the host and writes it beside the training; the checkpoint appears, whole, in one rename.
"""

from __future__ import annotations

import inspect
import logging
import shutil
import threading
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import layout
from runtime.dist import ALONE, World
from runtime.errors import CheckpointError
from runtime.shard import RowShard

try:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import LoadPlanner, SavePlanner, StorageReader, StorageWriter
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
    from torch.distributed.checkpoint.storage import WriteResult
except ImportError:  # torch before 2.0, or built without distributed
    dcp = None
    LoadPlanner = SavePlanner = StorageReader = StorageWriter = object

log = logging.getLogger(__name__)


def available() -> bool:
    """Whether this torch can write and read sharded checkpoints."""
    # 2.2 has the interface, but loads only where there is a process group.
    return dcp is not None and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 3)


def _check_available() -> None:
    if not available():
        raise CheckpointError(
            f"sharded checkpoints need torch 2.3 or newer with torch.distributed, this is {torch.__version__}: "
            "install one, or save .pth files"
        )


# --- saving ----------------------------------------------------------------------------------------------------------


class Saver:
    """Saves checkpoints of one run into `folder`, which all ranks see and no other run writes to.

    keep: how many of the newest stay. background: copy the state to the host (as much memory again as this rank's
    share) and write it while training goes on; otherwise write from where it is, 32 MiB at a time.
    published(path): called on rank 0, from the writing thread, with each new checkpoint.
    """

    def __init__(self, folder, world: World = ALONE, keep: int = 2, background: bool = True, published=None):
        _check_available()
        self.folder, self.world, self.keep = Path(folder), world, keep
        self._published = published
        self._background = background
        self._thread = None
        self._error = None
        self._group = world.host_group
        if background and world.size > 1:
            # The writing threads talk while the training ranks talk: on a group of its own, neither takes the
            # other's messages.
            self._group = torch.distributed.new_group(backend="gloo")

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.wait()

    def save(self, name: str, state: dict, rows: dict, local=None) -> None:
        """Starts a checkpoint `{number}-{name}`; waits for the one before. Call it on all ranks.

        state: nested dicts and lists of tensors and plain values, the same on every rank.
        rows: name -> (tensor [shard.rows, ...], RowShard): this rank's rows of a table. The same names, trailing
        dimensions and totals on every rank. local: what only this rank has (generators), nested like state.
        Raises CheckpointError if the save before failed, or (not in the background) this one.
        """
        self.wait()
        job = _Job(state, rows, local, self.world.rank, self.world.size)
        if self._background:
            job.copy_to_host()
            self._thread = threading.Thread(target=self._write_aside, args=(name, job), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(name, job)

    def wait(self) -> None:
        """Until the last checkpoint is published. Raises CheckpointError if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_aside(self, name, job) -> None:
        try:
            self._write(name, job)
        except BaseException as error:  # handed to whoever waits
            self._error = error

    def _write(self, name: str, job: _Job) -> None:
        start = time.monotonic()
        writer = _Writer(self.folder, name)
        try:
            with _one_line(f"{self.folder}: checkpoint {name} not saved"):
                dcp.save({}, storage_writer=writer, planner=job, **_alone_or(dcp.save, self.world, self._group))
        except BaseException:
            if writer.temporary is not None and self.world.is_main:
                shutil.rmtree(writer.temporary, ignore_errors=True)
            raise
        if self.world.is_main:
            log.info("saved %s in %.1f s", writer.final, time.monotonic() - start)
            layout.prune(self.folder, self.keep)
            if self._published is not None:
                self._published(writer.final)


def _alone_or(function, world: World, group) -> dict:
    """How to tell dcp.save or dcp.load which ranks take part."""
    if world.size > 1:
        return {"process_group": group}
    warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
    # Older versions see for themselves that there is no process group.
    return {"no_dist": True} if "no_dist" in inspect.signature(function).parameters else {}


@contextmanager
def _one_line(what: str):
    """The first rank's error, from the collection of them that torch raises on every rank."""
    try:
        yield
    except dcp.api.CheckpointException as collected:
        rank, (error, _trace) = min(collected.failures.items(), key=lambda item: item[0])
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{what} (rank {rank}: {error.strerror or error}); earlier ones are untouched: "
                "free space or choose another folder"
            ) from collected
        raise error from collected


@dataclass(frozen=True)
class _Part:
    """What one rank writes of one tensor: `tensor` is rows [row, row + len) of `rows`."""

    tensor: object
    row: int
    rows: int


class _Job(SavePlanner):
    """One checkpoint as this rank sees it, and (on rank 0) the plan of the whole."""

    def __init__(self, state, rows, local, rank: int, size: int):
        alike, own = {}, {}
        values = layout.encode(state, "state", alike)
        self._tree = (values, layout.encode(local, f"rank{rank}", own))
        self._parts = {name: _Part(tensor, 0, len(tensor)) for name, tensor in own.items()}
        for i, (name, tensor) in enumerate(alike.items()):
            if i % size == rank:  # the ranks share the writing of what they all have
                self._parts[name] = _Part(tensor, 0, len(tensor))
        for name, (tensor, shard) in rows.items():
            if len(tensor) != shard.rows:
                raise CheckpointError(f"rows of {name}: {len(tensor)} given, the shard has {shard.rows}")
            if shard.rows or shard.total == 0:
                self._parts[f"rows.{name}"] = _Part(tensor.detach(), shard.start, shard.total)

    def copy_to_host(self) -> None:
        self._parts = {
            name: _Part(part.tensor.to("cpu", copy=True), part.row, part.rows) for name, part in self._parts.items()
        }

    # What follows is called by dcp.save, in this order.

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self):
        items = []
        for name, part in self._parts.items():
            tensor = part.tensor
            size = torch.Size((part.rows, *tensor.shape[1:]))
            for row, rows in layout.split_rows(len(tensor), tensor[:1].numel() * tensor.element_size()):
                offsets = torch.Size((part.row + row, *[0] * (tensor.dim() - 1)))
                chunk = ChunkStorageMetadata(offsets, torch.Size((rows, *tensor.shape[1:])))
                data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), size)
                items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items, planner_data=self._tree)

    def create_global_plan(self, all_plans):
        tensors = {}
        for plan in all_plans:
            for item in plan.items:
                data = item.tensor_data
                entry = tensors.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
                if (entry.size, entry.properties.dtype) != (data.size, data.properties.dtype):
                    raise CheckpointError(
                        f"{item.index.fqn}: {list(data.size)} {data.properties.dtype} on one rank, "
                        f"{list(entry.size)} {entry.properties.dtype} on another"
                    )
                entry.chunks.append(data.chunk)
        trees = [plan.planner_data for plan in all_plans]
        # The values are those of rank 0; the second halves are each rank's own.
        return all_plans, Metadata(tensors, planner_data=(trees[0][0], [own for _values, own in trees]))

    def finish_plan(self, new_plan):
        return new_plan

    def resolve_data(self, write_item):
        part = self._parts[write_item.index.fqn]
        start = write_item.index.offset[0] - part.row
        return part.tensor[start : start + write_item.tensor_data.chunk.sizes[0]]


class _Writer(StorageWriter):
    """Writes this rank's pieces; on rank 0 also makes the directory and publishes it."""

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name
        self.temporary = self.final = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True

    def reset(self, checkpoint_id=None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator, *args, **kwargs) -> None:
        pass

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        self.temporary, self.final = layout.begin(self._folder, self._name)
        return [
            SavePlan(plan.items, storage_data=(rank, str(self.temporary)), planner_data=None)
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan, planner):
        rank, temporary = plan.storage_data
        results = []
        if not Path(temporary).is_dir():
            raise CheckpointError(f"{temporary}: rank 0 made it, rank {rank} does not see it: use a shared folder")
        with layout.RankFile(temporary, rank) as file:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                data = tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
                piece = file.append(item.tensor_data.chunk.offsets[0], len(tensor), data)
                results.append(WriteResult(item.index, piece.bytes, piece))
        done = torch.futures.Future()
        done.set_result(results)
        return done

    def finish(self, metadata, results) -> None:
        pieces = {}
        for result in sorted((r for of_rank in results for r in of_rank), key=lambda r: r.storage_data.row):
            pieces.setdefault(result.index.fqn, []).append(result.storage_data)
        tensors = {
            name: layout.Stored(str(entry.properties.dtype).split(".")[1], tuple(entry.size), pieces[name])
            for name, entry in metadata.state_dict_metadata.items()
        }
        values, local = metadata.planner_data
        layout.write_index(self.temporary, layout.Index(len(results), values, local, tensors))
        layout.read_index(self.temporary)  # rows that no rank holds must fail now, not when they are needed
        layout.publish(self.temporary, self.final)


# --- loading ---------------------------------------------------------------------------------------------------------


def newest(folder) -> Path | None:
    """The newest whole checkpoint of `folder`, or None."""
    return layout.newest(folder)


def load(path, rows: dict, world: World = ALONE) -> tuple:
    """Reads the checkpoint directory `path` -> (state, local), both on cpu; fills `rows` in place. Call on all ranks.

    rows: name -> (tensor [shard.rows, ...], RowShard), a subset of those saved, on any device; floating point tensors
    may be of another floating point dtype than the saved ones. At most one piece (32 MiB) is held beside them.
    local: what this rank saved, or None if the checkpoint is of fewer ranks.
    Raises CheckpointError, on all ranks, if any rank finds its part damaged or of another shape.
    """
    _check_available()
    reader = _Loader(path, rows, world.rank)
    with _one_line(f"{path}: not read"):
        dcp.load({}, storage_reader=reader, planner=reader.planner, **_alone_or(dcp.load, world, world.host_group))
    index = reader.planner.index
    local = index.local[world.rank] if world.rank < index.world_size else None
    targets = reader.planner.targets
    return layout.decode(index.values, targets), layout.decode(local, targets)


def load_newest(folder, rows: dict, world: World = ALONE):
    """load() of the newest checkpoint of `folder` that can be read: (path, state, local), or None if there is none.

    A checkpoint that turns out damaged is logged, and the one before it taken.
    """
    # One rank's list for all: what a rank sees of a shared folder may lag behind.
    for path in world.all_gather_object(list(layout.newest_first(folder)) if world.is_main else None)[0]:
        try:
            state, local = load(path, rows, world)
        except CheckpointError as error:
            log.warning("skipped %s", error)
        else:
            return path, state, local
    return None


class _LoadPlan(LoadPlanner):
    def __init__(self, path, rows: dict, rank: int):
        self._path, self._rows, self._rank = Path(path), rows, rank
        self.index = None
        self.targets = {}  # name -> tensor to fill

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self):
        self.index = layout.read_index(self._path)
        items = []
        for name, (tensor, shard) in self._rows.items():
            items += self._read(f"rows.{name}", tensor.detach(), shard)
        for name, stored in self.index.tensors.items():
            prefix = name.split(".")[0]
            if prefix in ("state", f"rank{self._rank}"):
                tensor = torch.empty(stored.shape, dtype=layout.DTYPES[stored.dtype][0])
                items += self._read(name, tensor, RowShard.of(len(tensor)))
        return LoadPlan(items)

    def _read(self, name: str, tensor, shard: RowShard) -> list:
        stored = self.index.tensors.get(name)
        what = f"{self._path}: {name}"
        if stored is None:
            raise CheckpointError(f"{what} is not in this checkpoint: take one of a run with the same options")
        if stored.shape != (shard.total, *tensor.shape[1:]):
            raise CheckpointError(
                f"{what} is {list(stored.shape)}, this run wants {[shard.total, *tensor.shape[1:]]}: "
                "take a checkpoint of as many classes and of the same embedding size"
            )
        dtype = layout.DTYPES[stored.dtype][0]
        if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.dtype.is_floating_point):
            raise CheckpointError(f"{what} is {dtype}, this run wants {tensor.dtype}: choose the same dtype")
        self.targets[name] = tensor
        rest = stored.shape[1:]
        saved = [
            ChunkStorageMetadata(torch.Size((p.row, *[0] * len(rest))), torch.Size((p.rows, *rest)))
            for p in stored.pieces
        ]
        wanted = ChunkStorageMetadata(torch.Size((shard.start, *[0] * len(rest))), torch.Size((shard.rows, *rest)))
        entry = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(stored.shape), saved)
        return create_read_items_for_chunk_list(name, entry, [wanted])

    def create_global_plan(self, global_plan):
        return global_plan

    def finish_plan(self, central_plan):
        return central_plan

    def load_bytes(self, read_item, value) -> None:
        raise NotImplementedError("plain values lie in the index")

    def resolve_tensor(self, read_item):
        return self.targets[read_item.dest_index.fqn].narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item, tensor) -> None:
        pass


class _Loader(StorageReader):
    def __init__(self, path, rows: dict, rank: int):
        self._path = Path(path)
        self.planner = _LoadPlan(path, rows, rank)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True

    def reset(self, checkpoint_id=None) -> None:
        pass

    def read_metadata(self, *args, **kwargs):
        # The planner reads the index: dcp.load takes an error raised here for a file of an older kind.
        return Metadata({})

    def set_up_storage_reader(self, metadata, is_coordinator, *args, **kwargs) -> None:
        pass

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return plans

    def read_data(self, plan, planner):
        tensors = planner.index.tensors
        reads = [(tensors[item.storage_index.fqn].pieces[item.storage_index.index], item) for item in plan.items]
        with layout.PieceReader(self._path) as reader:
            for piece, item in sorted(reads, key=lambda read: (read[0].file, read[0].start)):
                target = planner.resolve_tensor(item)
                if not target.numel():
                    continue
                dtype = layout.DTYPES[tensors[item.storage_index.fqn].dtype][0]
                source = torch.frombuffer(reader.read(piece), dtype=dtype).reshape(piece.rows, *target.shape[1:])
                target.copy_(source.narrow(0, item.storage_offsets[0], item.lengths[0]))
                planner.commit_tensor(item, target)
        done = torch.futures.Future()
        done.set_result(None)
        return done


# --- when to save ----------------------------------------------------------------------------------------------------


class SaveEvery:
    """Says when a checkpoint is due: every `steps` steps, or when `minutes` have passed; neither: never.

    Ranks agree: minutes are asked of all of them, once in CHECK_STEPS steps because that is a collective.
    """

    CHECK_STEPS = 20

    def __init__(self, steps: int = 0, minutes: float = 0, world: World = ALONE, clock=time.monotonic):
        self._steps, self._seconds, self._world, self._clock = steps, 60 * minutes, world, clock
        self._last = clock()

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps (counted from 1, the same on all ranks)."""
        due = bool(self._steps) and step % self._steps == 0
        if self._seconds and step % self.CHECK_STEPS == 0:
            passed = torch.tensor(float(self._clock() - self._last >= self._seconds), device=self._world.device)
            due = bool(self._world.all_reduce_(passed, "max").item()) or due
        if due:
            self._last = self._clock()
        return due
