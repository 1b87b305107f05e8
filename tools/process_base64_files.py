"""Shuffle a base64 list as a whole and cut it into one file for each rank:

python tools/process_base64_files.py --data_dir=./dataset --file_list=file_list.txt --nranks=8

The options are PLSC's. The parts of the list stay, and so does the list, as file_list.txt.before.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import base64_shuffle
from runtime.errors import DataError
from runtime.log import Parser, run_command


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="root of the training set")
    parser.add_argument("--file_list", required=True, help="name of the list in it, as file_list.txt")
    parser.add_argument("--nranks", type=int, required=True, help="devices that will train: one file for each")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same order [0]")
    parser.add_argument("--memory_mib", type=int, default=1024, help="MiB of the set that are held at a time [1024]")
    parser.add_argument("--workers", type=int, default=None, help="processes [one a core]")
    options = parser.parse_args()
    if not 1 <= options.memory_mib <= 1 << 30:
        raise DataError(f"--memory_mib {options.memory_mib}: at least 1 MiB")
    memory = options.memory_mib << 20
    made = base64_shuffle.shuffle(
        options.data_dir, options.file_list, options.nranks, options.seed, memory, options.workers
    )
    print(f"{len(made)} files, {made[0].name} to {made[-1].name}; {options.file_list} names them")


if __name__ == "__main__":
    run_command(main)
