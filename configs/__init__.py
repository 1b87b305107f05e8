"""Recipes: named sets of options, each derived from another. `--recipe=NAME` starts from one."""

from __future__ import annotations

import sys
from pathlib import Path

from config import Config, replace
from configs.published import LACKING, PUBLISHED
from runtime.errors import ConfigError

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

# Two CPU cores, four minutes: the synthetic faces of `python -m data.synthetic`, 1,600 images of 40 people.
quickstart = replace(
    full_1p,
    net_mode="mobilefacenet",
    epochs=6,
    batch_size=32,
    lr=0.1,
    milestones=(4, 5),
    warmup_epochs=0.5,
    memory_format="fastest",
)

OWN = {name: value for name, value in list(globals().items()) if isinstance(value, Config)}
RECIPES = {**OWN, **{name: published.config for name, published in PUBLISHED.items()}}


def take_config(argv: list, ranks: int = 1) -> tuple:
    """(argv, recipes) with `--config NAME|FILE` turned into `--recipe`, a file's recipe being among the recipes.

    What such a file says that has no place here goes to stderr, on rank 0. Raises ConfigError."""
    from configs.foreign import read_config  # ast and what it needs only where there is a file

    words = [word for at, word in enumerate(argv) if word.startswith("--config=") or argv[at - 1 : at] == ["--config"]]
    if not words:
        if "--config" in argv:
            raise ConfigError("--config: give a recipe's name (--list_configs shows them) or a file")
        return argv, RECIPES
    name = words[-1].split("=", 1)[-1]
    rest = [word for word in argv if word not in words and word != "--config"]
    if name in RECIPES:
        return ["--recipe", name, *rest], RECIPES
    stem = Path(name).stem
    if not Path(name).is_file() and stem in RECIPES:  # configs/ms1mv3_r50, as arcface_torch's own commands name it
        return ["--recipe", stem, *rest], RECIPES
    if not name.endswith(".py"):
        raise ConfigError(f"--config '{name}': --list_configs shows the recipes; a config file ends in .py")
    recipe, notes = read_config(name, ranks)
    for note in notes:
        print(f"{name}: {note}", file=sys.stderr)
    return ["--recipe", name, *rest], {**RECIPES, name: recipe}


def table() -> str:
    """Every recipe in a line: network, data, batch, schedule, time, accuracy, source."""
    lines = [f"{'recipe':<30} {'network':<16} {'batch':>12} {'lr':>7} {'epochs':>6}  data; time; accuracy; source"]
    for name, config in RECIPES.items():
        network = config.net_mode if config.net_mode.startswith("m") else f"{config.net_mode} {config.net_depth}"
        known = PUBLISHED.get(name)
        batch = f"{config.batch_size}" + (f" = {known.per_rank}x{known.ranks}" if known else "")
        about = (
            "; ".join((known.data, f"{known.wall} on {known.hardware}", known.accuracy, known.source)) if known else ""
        )
        about = about or "this project's own; none published"
        lines.append(f"{name:<30} {network:<16} {batch:>12} {config.lr:>7g} {config.epochs:>6}  {about}")
    lines += ["", "published elsewhere, and what this program lacks for it:"]
    lines += [f"{name}: {lacks}" for name, lacks in LACKING.items()]
    return "\n".join(lines)
