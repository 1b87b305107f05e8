"""The checkpoints of one run: saved, found again and restored, whichever the format, here and in a remote store.

A training's state is `state` (nested dicts of tensors and plain values, the same on every rank), `rng` (this rank's
generators) and the head, whose rows each rank holds by itself. `.pth`: all of it in one file, in the upstream
project's schema (`model head optimizer epoch config`, and `meta training` beside). Sharded: every rank writes its own.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Optional

from checkpoint import layout, lock, remote, reshard, schema, sharded, store
from runtime.dist import ALONE, World
from runtime.errors import CheckpointError, DamagedCheckpoint

log = logging.getLogger(__name__)


OWN_PATIENCE_S = 30.0  # with a store that is away, where there is a checkpoint here to go on from


class Restored(NamedTuple):
    """What `save` was given; rng is None on a rank that did not exist then."""

    path: Path
    state: dict
    rng: Optional[dict]


def read(path, world: World = ALONE) -> tuple[Path, Any]:
    """(the checkpoint itself, what it holds without the class centers): of a `.pth` file, a sharded directory, or a
    folder of either, of which the newest whole one is taken.

    Raises CheckpointError, one line.
    """
    path = Path(path)
    if path.is_dir():
        # of files with other names, as other projects leave them, the one written last
        others = sorted(filter(Path.is_file, path.glob("*.pth")), key=lambda file: file.stat().st_mtime)
        newest = store.newest(path) or store.newest(path / "models") or (others[-1] if others else None)
        if newest is None:
            try:
                path = reshard.find(path)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; there is no .pth file in it either") from None
            return path, _network(path, sharded.load(path, {}, world)[0])
        path = newest
    return path, _network(path, store.load_pth(path))


def _network(path, state):
    if isinstance(state, dict) and "meta" in state:  # ours
        schema.check(state, schema.NETWORK, path)
    return state


class Checkpoints:
    """`work_path`/models of `.pth` files, /sharded of directories, /downloaded of both.

    kind: "pth" or "sharded", what is saved; both are restored. keep: how many stay beside the best and the newest.
    fs_name: address of a remote store. fs_ugi: "name,password" for it, by default the variable FS_UGI.
    """

    def __init__(self, work_path, world: World = ALONE, kind: str = "pth", keep: int = 1, fs_name="", fs_ugi=""):
        self.work_path = Path(work_path)
        self.models, self.sharded, self.downloaded = (self.work_path / n for n in ("models", "sharded", "downloaded"))
        self.kind, self.keep = kind, keep
        self.saved: list[str] = []  # names of this run's checkpoints: others in the folder are not its to delete
        self._world, self._fs_name, self._fs_ugi = world, fs_name, fs_ugi
        self._uploader: Optional[remote.Uploader] = None
        self._saver: Optional[sharded.Saver] = None
        self._fetched: Optional[Path] = None  # what came from the store

    @property
    def folder(self) -> Path:
        """Where this run's checkpoints go."""
        return self.sharded if self.kind == "sharded" else self.models

    # --- saving ------------------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self, upload_to: str = ""):
        """While open, `save` can be called, and no other run can write to `work_path`. upload_to: folder of the store
        that gets a copy of each checkpoint.

        Raises CheckpointError where nothing can be written, or kept in the store: before the training, not hours later;
        and at its end where the store has not got everything."""
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            reason = None if os.access(folder, os.W_OK) else "no permission"
        except OSError as error:
            reason = error.strerror
        if reason:
            raise CheckpointError(
                f"{folder}: no checkpoint can be written there ({reason}): choose another --work_path"
            )
        try:
            with ExitStack() as stack:
                if self._world.is_main:
                    stack.enter_context(lock.held(self.work_path))
                if upload_to and self._world.is_main:
                    target = self._store(upload_to)
                    target.try_out()
                    self._uploader = stack.enter_context(remote.Uploader(target))
                if self.kind == "sharded":
                    saver = sharded.Saver(self.sharded, self._world, keep=self.keep + 1, published=self._publish)
                    saver.names = self.saved
                    self._saver = stack.enter_context(saver)
                yield self
        finally:  # after the last checkpoint was written and has been handed on
            self._uploader, self._saver = None, None

    def _publish(self, path: Path) -> None:
        if self._uploader is not None:
            self._uploader.put(path, int(path.name.rsplit("_", 1)[1]))

    def save(self, state: dict, rng: dict, head, replaces: Optional[Path] = None) -> Optional[Path]:
        """Writes a checkpoint; call it on all ranks. Returns its path on rank 0; a sharded one, written beside the
        training, has none yet.

        replaces: a `.pth` that this one says the same of and more; it goes when this one is whole."""
        training = {**state["training"], "saved": self.saved}
        if self._saver is not None:
            head_state = head.local_state()
            state["head"] = {name: head_state[name] for name in ("draws", "updates", "norms")}
            self._saver.save(f"step_{training['step']}", {**state, "training": training}, _rows(head), {"rng": rng})
            return None
        training["rng"] = self._world.all_gather_object(rng)
        state["head"] = {"kernel": head.gathered_kernel()}
        training["head"] = head.gathered_training_state()
        path = None
        if self._world.is_main:
            path = store.next_path(self.models, state["epoch"], training["accuracy"], self.saved)
            self.saved.append(path.name)
            store.save_pth(path, {**state, "training": training})
            store.keep_newest(path)
            if replaces is not None and replaces != path:
                replaces.unlink()
            store.prune(self.models, keep=self.keep, names=self.saved)
            log.info("saved %s", path)
            if self._uploader is not None:
                self._uploader.put(path, training["step"])
        self._world.barrier()
        return path

    def wait(self) -> None:
        """Until what was saved is whole on the disk."""
        if self._saver is not None:
            self._saver.wait()

    # --- restoring ---------------------------------------------------------------------------------------------------

    def restore(self, wanted: str, meta: dict, head) -> Optional[Restored]:
        """The checkpoint `wanted`; the head has its rows then. Call it on all ranks; all take the same.

        wanted: a `.pth` file or a sharded directory; "newest" or "auto" is the newest whole one of either kind of this
        run, and None is what comes back where "auto" finds none.
        meta: what the run is (`store.check_architecture`). Raises CheckpointError for what does not fit."""
        if wanted not in ("auto", "newest"):
            return self._restore(Path(wanted), meta, head)
        problem = None
        for path in self._newest_first():
            try:
                if path.is_file():
                    return self._restore(path, meta, head)
                found = sharded.load_newest(path.parent, _rows(head), self._world, _checked(meta))
                return self._taken(*found, head)
            except DamagedCheckpoint as error:  # what is damaged is passed over; what does not fit stops the run
                log.warning("skipped %s", error)
                problem = error
        if problem is not None or self._anything():
            raise CheckpointError(
                f"{self.work_path}: holds checkpoints, and none of them is whole: copy one here again, or move them "
                "away to start anew"
            )
        if wanted == "newest":
            raise CheckpointError(f"{self.work_path}: no whole checkpoint to resume: train first, or name one")
        log.info("%s: no checkpoint to resume, the training starts from the beginning", self.work_path)
        return None

    def take(self, path: Path, state: dict, meta: dict, head) -> Restored:
        """The same of a checkpoint that `read` has read."""
        if path.is_dir():
            return self._restore(path, meta, head)
        _checked(meta, schema.TRAINING_PTH)(path, state)
        training = state["training"]
        with schema.fitting(path):
            head.load_kernel(state["head"]["kernel"])
            head.load_training_state(training["head"])
        self.saved[:] = [*training.get("saved", []), path.name]
        rng = training["rng"]
        return Restored(path, state, rng[self._world.rank] if self._world.rank < len(rng) else None)

    def _restore(self, path: Path, meta: dict, head) -> Restored:
        if path.is_dir():
            path = reshard.find(path)
            return self._taken(path, *sharded.load(path, _rows(head), self._world, _checked(meta)), head)
        return self.take(path, store.load_pth(path), meta, head)

    def _taken(self, path, state, local, head) -> Restored:
        with schema.fitting(path):
            head.load_local_state({**head.local_state(), **state["head"]})
        self.saved[:] = [*state["training"].get("saved", []), path.name]
        return Restored(path, state, None if local is None else local["rng"])

    def _newest_first(self) -> list[Path]:
        """The newest whole checkpoint of each kind, as rank 0 sees them, on every rank; before them what came from the
        store, which is newer."""
        found = []
        if self._world.is_main:
            found = [store.newest(self.models), sharded.newest(self.sharded)]
            found = sorted(filter(None, found), key=lambda path: path.stat().st_mtime, reverse=True)
            fetched = self._fetched
            if fetched is not None:
                whole = [fetched] if fetched != self.downloaded else [store.newest(fetched), sharded.newest(fetched)]
                found = [*filter(None, whole), *found]
        return self._world.all_gather_object(found)[0]

    def _own_step(self) -> int:
        """How far the newest checkpoint here is, as rank 0 sees it; -1 where there is none."""
        steps = [-1]
        if self._world.is_main:
            for path in filter(None, (store.newest(self.models), sharded.newest(self.sharded))):
                with suppress(CheckpointError, ValueError):  # `restore` says what is wrong with it, on every rank
                    steps.append(_step(path))
        return self._world.all_gather_object(max(steps))[0]

    def _anything(self) -> bool:
        """Whether there are any checkpoints, whole or not."""
        here = [*store.list_saved(self.models), *layout.named(self.sharded)]
        return self._world.all_gather_object(bool(here))[0]

    # --- the remote store --------------------------------------------------------------------------------------------

    def download(self, folder: str, may_be_empty: bool) -> None:
        """Brings the store's newest checkpoint here, once a machine, unless this run's own is as new.

        Raises CheckpointError, on all ranks, if the store stays away, or holds nothing and may not be empty; with a
        checkpoint of its own a run goes on from that, with a warning."""
        error, own = None, self._own_step()
        if self._world.local_rank == 0:
            patience = {"above": own, "give_up_s": OWN_PATIENCE_S} if own >= 0 else {}
            try:
                self._fetched = remote.download(self._store(folder), self.downloaded, **patience)
            except remote.EmptyStore as empty:
                error = None if may_be_empty or own >= 0 else str(empty)
            except CheckpointError as failed:
                error = str(failed)
                if own >= 0:
                    log.warning("%s; goes on from the checkpoint here, of step %d", error, own)
                    error = None
        errors = [one for one in self._world.all_gather_object(error) if one]
        if errors:
            raise CheckpointError(errors[0])

    def _store(self, folder: str) -> remote.Store:
        url = f"{self._fs_name.rstrip('/')}/{folder.strip('/')}"
        return remote.Store(url, self._fs_ugi or os.environ.get("FS_UGI", ""))


def _step(path: Path) -> int:
    """How far a checkpoint of ours is."""
    if path.is_dir():
        return int(path.name.rpartition("_")[2])
    state = store.load_pth(path)
    schema.check(state, schema.TRAINING_PTH, path)
    return state["training"]["step"]


def _checked(meta: dict, kinds: dict = schema.TRAINING):
    """What says, before anything of a checkpoint is used, that it is one and of this network and these classes."""

    def check(path, state) -> None:
        schema.check(state, kinds, path)
        store.check_architecture(state["meta"], meta, path)

    return check


def _rows(head) -> dict:
    """What this rank holds of the head's tables: {name: (the stored tensor itself, its RowShard)}."""
    state, shard = head.local_state(), head.centers.shard
    names = ("weight", "momentum", "momentum_scale")
    return {name: (state[name], shard) for name in names if state[name] is not None}
