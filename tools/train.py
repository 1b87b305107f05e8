"""arcface_paddle's training command with its options: python tools/train.py --config_file configs/ms1mv3_r50.py ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plsc import arcface_paddle
from runtime.log import run_command


def main() -> None:
    arcface_paddle.train(arcface_paddle.parse(sys.argv[1:]))


if __name__ == "__main__":
    run_command(main)
