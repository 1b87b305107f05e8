"""Train a face recognition network: `python train.py --recipe=full_1p --data_path=...`, alone or under torchrun."""

from __future__ import annotations

import os
import sys

import config as options
import configs
import report
from runtime import log
from runtime.errors import UserError


def main() -> int:
    if "--list_configs" in sys.argv[1:]:
        print(configs.table())
        return 0
    argv, recipes = configs.take_config(sys.argv[1:], int(os.environ.get("WORLD_SIZE", 1)))
    config = options.parse_arguments(argv, recipes=recipes)
    # torch and what stands on it only now: --help and a misspelt option answer at once
    from learner import Learner
    from runtime.device import parse_device
    from runtime.dist import open_world, world_env
    from runtime.signals import Stopped

    ranks = world_env()
    log.setup_logging(ranks["rank"], ranks["size"])
    if config.distributed and ranks["size"] == 1:
        raise options.ConfigError("--distributed: only one rank was started; use test/train_full_8p.sh or torchrun")
    device = parse_device(config.device_type, config.device_id + ranks["local_rank"])
    device.set()
    with open_world(device, config.dist_timeout, config.dist_backend) as world, device.failures_explained():
        try:
            learner = Learner.from_config(config, device, world)
            learner.train()
        except Stopped as stopped:
            print(f"error: {stopped}", file=sys.stderr)
            return 128 + stopped.signal_number
    if world.is_main:
        try:
            report.finish(learner.run_dir, case=config.case)
        except (UserError, OSError) as error:  # trained and saved: a full disk for its logs takes nothing from that
            print(f"no report: {log.one_line(error)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    log.run_command(main)
