"""Recipes: named sets of options, each derived from another. `--recipe=NAME` starts from one."""

from __future__ import annotations

from config import Config, replace

# One device: ir_se 100 on faces_emore. The model zoo's own entry gives about 40 hours on one NPU.
# `bash test/train_full_1p.sh --data_path=./data/faces_emore/`
full_1p = Config(net_mode="ir_se", net_depth=100, epochs=20, batch_size=256, lr=0.001, milestones=(12, 15, 18))

# Eight devices, 320 images on each. The model zoo's own entry gives LFW 0.9967, 4,696 images/s and 7 hours on NPUs.
# `bash test/train_full_8p.sh --data_path=./data/faces_emore/`
full_8p = replace(full_1p, batch_size=320 * 8, lr=0.01)

# Speed alone: two epochs of a thousand steps, verification left out of the way.
performance_1p = replace(full_1p, epochs=2, max_iter=1000)
performance_8p = replace(full_8p, epochs=2, max_iter=1000)

# A new head on a given backbone (`--pth_path`).
finetune_1p = replace(full_1p, is_finetune=True)

# Two CPU cores, four minutes: the drawn faces of `python -m data.synthetic`, 1,600 images of 40 people.
quickstart = replace(
    full_1p,
    net_mode="mobilefacenet",
    epochs=6,
    batch_size=32,
    lr=0.1,
    milestones=(4, 5),
    warmup_epochs=0.5,
    memory_format="channels_last",
)

RECIPES = {name: value for name, value in list(globals().items()) if isinstance(value, Config)}
