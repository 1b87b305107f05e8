"""What the ranks of test_torchrun.py run: `python torchrun_float64.py FILE` trains in float64, rank 0 writes losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "test"), str(ROOT)]


def main() -> None:
    import torch
    import workers_learner

    from runtime.device import Device
    from runtime.dist import open_world

    torch.set_num_threads(1)
    with open_world(Device("cpu"), timeout_s=120) as world:
        losses, _weights, _kernel = workers_learner.train_in_float64(world)
        if world.is_main:
            Path(sys.argv[1]).write_text(json.dumps({"size": world.size, "losses": losses}))


if __name__ == "__main__":
    main()
