"""The checkpoints of one run: where they lie, which is the newest, and their copies in a remote store."""

from __future__ import annotations

import os
from pathlib import Path

from checkpoint import remote, sharded, store
from runtime.dist import World
from runtime.errors import CheckpointError


class RunFolder:
    """A run's folder: models/ of `.pth` files, sharded/ of directories, downloaded/ of both.

    fs_name: address of the remote store. fs_ugi: "name,password" for it, by default the variable FS_UGI.
    """

    def __init__(self, path, world: World, fs_name: str = "", fs_ugi: str = ""):
        self.models, self.sharded, self.downloaded = (Path(path) / n for n in ("models", "sharded", "downloaded"))
        self._world, self._fs_name, self._fs_ugi = world, fs_name, fs_ugi

    def make(self, kind: str) -> None:
        """Makes the folder for checkpoints of a kind ("pth", "sharded") now: the first is saved after hours.

        Raises CheckpointError where nothing can be written."""
        path = self.sharded if kind == "sharded" else self.models
        try:
            path.mkdir(parents=True, exist_ok=True)
            reason = None if os.access(path, os.W_OK) else "no permission"
        except OSError as error:
            reason = error.strerror
        if reason:
            raise CheckpointError(f"{path}: no checkpoint can be written there ({reason}): choose another --work_path")

    def newest_first(self) -> list[Path]:
        """The newest whole checkpoint of each kind, as rank 0 sees them, on every rank. What was downloaded counts
        where there is none of this run's own: uploads follow what is saved here."""
        found = []
        if self._world.is_main:
            found = [store.newest(self.models), sharded.newest(self.sharded)]
            if not any(found):
                found = [store.newest(self.downloaded), sharded.newest(self.downloaded)]
            found = [path for path in found if path is not None]
            found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        return self._world.all_gather_object(found)[0]

    def uploader(self, folder: str) -> remote.Uploader:
        """Brings checkpoints into that folder of the store, from a thread of its own."""
        return remote.Uploader(self._store(folder))

    def download(self, folder: str, may_be_empty: bool) -> None:
        """Brings the store's checkpoints here, once a machine, unless there are some of this run's own.

        Raises CheckpointError, on all ranks, if the store stays away, or holds nothing and may not be empty."""
        error = None
        if not self.newest_first() and self._world.local_rank == 0:
            try:
                remote.download(self._store(folder), self.downloaded)
            except remote.EmptyStore as empty:
                error = None if may_be_empty else str(empty)
            except CheckpointError as failed:
                error = str(failed)
        errors = [one for one in self._world.all_gather_object(error) if one]
        if errors:
            raise CheckpointError(errors[0])

    def _store(self, folder: str) -> remote.Store:
        url = f"{self._fs_name.rstrip('/')}/{folder.strip('/')}"
        return remote.Store(url, self._fs_ugi or os.environ.get("FS_UGI", ""))
