"""What ranks of test_plsc_ranks.py run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_adam(parameters):
    """An optimizer of the user's own, at the rate that PLSC's would have."""
    import torch

    return torch.optim.Adam(parameters, lr=0.1 * 8 / 1024)


def main(folder: str) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    import tiny_net  # noqa: F401  the backbone

    import plsc

    plsc.config.config.update(
        model_name="tiny", emb_dim=16, num_classes=4, train_batch_size=4, train_epochs=1, train_image_num=16,
        test_batch_size=10,
    )  # fmt: skip
    for task in ("trained", "reader"):
        run(task)


def run(task: str) -> None:
    import numpy as np

    from plsc import Entry

    rank = int(os.environ["PADDLE_TRAINER_ID"])
    entry = Entry()
    assert entry.global_train_batch_size == 8 and entry.num_trainers == 2
    if task == "reader":
        # 5 batches on one rank and 3 on the other, which see the same images at first
        batches = [[(np.full((3, 112, 112), number, np.float32), number % 4)] * 4 for number in range(5 - 2 * rank)]
        entry.train_reader = lambda: iter(batches)
        entry.set_with_test(False)
        entry.set_loss_type("dist_softmax")
    else:
        entry.set_optimizer(make_adam)
    entry.set_model_save_dir(f"./{task}")
    entry.train()


if __name__ == "__main__":
    import plsc  # noqa: F401  sets PADDLE_TRAINER_ID, as a user's script may read it before anything else

    main(*sys.argv[1:])
