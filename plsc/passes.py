"""A folder of its own for the checkpoint of each pass: `<work_path>/0/`, `1/` ..., with meta.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

from checkpoint import sharded
from runtime.files import write_text


class FolderAPass:
    """Before Learner among a class's bases: `save` writes into the folder of the pass."""

    def train(self) -> None:
        self.checkpoints.models = self.checkpoints.sharded = Path(self.config.work_path)  # no folder beside the passes'
        super().train()

    def save(self, replaces: Optional[Path] = None) -> Optional[Path]:
        at, checkpoints = self.progress, self.checkpoints
        folder = Path(self.config.work_path) / str(at.epoch if at.step_in_epoch else max(0, at.epoch - 1))
        if self.world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
        self.world.barrier()
        checkpoints.models = checkpoints.sharded = folder
        spread = checkpoints.kind == "sharded"
        if spread:
            checkpoints._saver = sharded.Saver(
                folder, self.world, keep=1, background=False, published=checkpoints._publish
            )
            checkpoints._saver.names = checkpoints.saved
        path = super().save(replaces)
        if self.world.is_main:
            meta = {
                "pretrain_nranks": self.world.size if spread else 1,
                "emb_dim": self.head.embedding_size,
                "num_classes": self.head.num_classes,
                "epoch": at.epoch,
            }
            write_text(folder / "meta.json", json.dumps(meta) + "\n")
        return path
