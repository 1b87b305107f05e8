"""Verify a network: `python evaluate.py --pth_path=model.pth [--data_path=FOLDER_OR_SET]`, alone or under torchrun.

The weights may be this project's or a known upstream project's; they say themselves which network they are for, and
which channel order it takes, unless `--weights_channel_order` says otherwise. Computes in fp32,
on a CPU that multiplies bf16 in that, which is quicker and costs no accuracy, unless `--opt_level` says otherwise.
Prints a table, and leaves evaluation.json and roc.png in `--output`,
metrics.jsonl (for report.py) in `--run_dir`; one of the two stands for both, work_space/evaluation for neither.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import config as options
import configs
import report
from runtime import files, log
from runtime.progress import progress, ticking

logger = logging.getLogger(__name__)


def main() -> int:
    if "--list_configs" in sys.argv[1:]:
        print(configs.table())
        return 0
    config = options.parse_arguments(sys.argv[1:], training=False, recipes=configs.RECIPES)
    # torch and what stands on it only now: --help and a misspelt option answer at once
    from runtime.device import parse_device
    from runtime.dist import open_world, world_env

    if not config.pth_path:
        raise options.ConfigError("--pth_path is missing: name the weights to evaluate")
    ranks = world_env()
    log.setup_logging(ranks["rank"], ranks["size"])
    sets = find_sets(config)
    device = parse_device(config.device_type, config.device_id + ranks["local_rank"])
    device.set()
    with open_world(device, config.dist_timeout, config.dist_backend) as world, device.failures_explained():
        evaluate(config, sets, device, world)
    return 0


def find_sets(config) -> dict[str, Path]:
    """{name: path} of the sets in `--data_path`, a folder of sets or one set; sets named by hand must exist."""
    from data import pairs
    from runtime.errors import DataError

    root = Path(config.data_path)
    found = pairs.find_pair_sets(root, config.val_targets)
    by_default = set(config.val_targets) == set(options.VERIFICATION_SETS)
    missing = [name for name in config.val_targets if name not in found]
    if missing and not by_default and not root.is_file():
        raise DataError(f"{root} holds no verification set {', '.join(missing)}: looked for NAME.bin and NAME/")
    if not found and any((root / mark).is_file() for mark in ("label.txt", "meta/sizes")):
        found = {root.resolve().name: root}
    if not found:
        raise DataError(f"{root} holds no verification set ({', '.join(config.val_targets)}): give --data_path")
    return found


def evaluate(config, sets: dict[str, Path], device, world) -> dict:
    """Evaluates the weights of `config.pth_path` on every set; rank 0 prints and writes. Returns {name: PairResult}."""
    from recognizer import Recognizer
    from verify import embed

    started = time.time()
    tuned = device.tune(config.tf32, config.autotune)
    recognizer = Recognizer.load(
        config.pth_path,
        device,
        config.weights_channel_order or None,
        config.opt_level,
        config.memory_format,
        world,
    )
    fast_paths = {**recognizer.fast_paths, "opt_level": recognizer.embedding_policy, **tuned}
    run_dir = Path(config.run_dir or config.output or Path(config.work_path) / "evaluation")
    folder = Path(config.output or run_dir)
    with log.RunLog(run_dir, world, config.as_dict(), tensorboard=False) as run_log:
        run_log.record(
            "run", task="evaluate", case=config.case, network=recognizer.name, batch_size=config.eval_batch_size,
            device=device.describe(), command=log.command_line(config.fs_ugi), fast_paths=fast_paths,
        )  # fmt: skip
        results = {}
        for name, path in sets.items():
            with progress(None, f"verifying on {name}", "image", shown=world.is_main) as bar:
                results.update(
                    recognizer.verify(
                        {name: path},
                        world,
                        config.eval_batch_size,
                        config.flip_sum,
                        config.channel_order or None,
                        progress=ticking(bar),
                    )
                )
        records = {name: embed.as_record(result) for name, result in results.items()}
        for name, record in records.items():
            run_log.record("verify", step=0, epoch=0, set=name, untrained=False, **record)
        run_log.record("end", seconds=time.time() - started, reason="finished", steps=0)
    if world.is_main:
        facts = {
            "weights": str(config.pth_path),
            "network": recognizer.name,
            "embedding_size": recognizer.architecture["embedding_size"],
            "channel_order": recognizer.channel_order,
            "flip_sum": config.flip_sum,
            "opt_level": fast_paths["opt_level"],
            "ranks": world.size,
            "device": device.describe(),
            "versions": log.versions(),
            "seconds": time.time() - started,
            "sets": {name: {"path": str(sets[name]), **record} for name, record in records.items()},
        }
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "evaluation.json", log.plain(facts))
        save_roc(results, folder / "roc.png")
        report.finish(run_dir, case=config.case)
        logger.info("results are in %s", folder)
    return results


def save_roc(results: dict, path: Path) -> None:
    from verify import plot

    try:
        plot.roc_figure({name: (result.roc.fpr, result.roc.tpr) for name, result in results.items()}).savefig(path)
    except ImportError:
        logger.info("matplotlib is not installed: no %s", path.name)


if __name__ == "__main__":
    log.run_command(main)
