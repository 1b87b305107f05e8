"""What ranks of test_plsc_ranks.py run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(folder: str, task: str) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    import numpy as np

    import plsc
    from plsc import Entry

    rank = int(os.environ["PADDLE_TRAINER_ID"])
    plsc.config.config.update(
        model_name="mobilefacenet", emb_dim=16, num_classes=4, train_batch_size=4, train_epochs=1,
        train_image_num=16, test_batch_size=10,
    )  # fmt: skip
    entry = Entry()
    assert entry.global_train_batch_size == 8 and entry.num_trainers == 2
    if task == "reader":
        # 5 batches on one rank and 3 on the other, which see the same images at first
        batches = [[(np.full((3, 112, 112), number, np.float32), number % 4)] * 4 for number in range(5 - 2 * rank)]
        entry.train_reader = lambda: iter(batches)
        entry.set_with_test(False)
        entry.set_loss_type("dist_softmax")
    entry.set_model_save_dir(f"./{task}")
    entry.train()


if __name__ == "__main__":
    import plsc  # noqa: F401  sets PADDLE_TRAINER_ID, as a user's script may read it before anything else

    main(*sys.argv[1:])
