"""Pack a folder of people into train.rec, train.idx and property, some of them apart for verification:

python tools/images_2_recordio.py --image_path=people --output_dir=data/mine --val_share=0.1

people/ holds one folder a person, with aligned faces of 112x112. The people set apart are in no training image; pairs
of them go into val.bin.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import random

from data import convert, pair_making
from data.folder import class_names
from runtime.errors import DataError
from runtime.log import Parser, run_command


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_path", required=True, help="folder with one folder of images a person")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--val_share", type=float, default=0.0, help="share of the people set apart [0]")
    parser.add_argument("--val_pairs", type=int, default=1000, help="pairs of them in val.bin [1000]")
    parser.add_argument("--seed", type=int, default=0, help="who is set apart, and the pairs")
    parser.add_argument("--workers", type=int, default=None, help="processes [one a core]")
    options = parser.parse_args()
    if not 0 <= options.val_share < 1:
        raise DataError(f"--val_share {options.val_share}: must be from 0 up to, but not including, 1")
    output = convert.make_folder(options.output_dir)
    people = list(range(len(class_names(options.image_path))))
    random.Random(options.seed).shuffle(people)
    apart = round(options.val_share * len(people))
    if apart:
        pairs = pair_making.pairs_of_folder(options.image_path, options.val_pairs, options.seed, people[:apart])
        pair_making.write_pairs(output / "val.bin", pairs, options.workers)
    images = convert.folder_to_recordio(options.image_path, output, people[apart:], options.workers)
    print(f"{output}: {images} images of {len(people) - apart} people to train on, {apart} people apart")


if __name__ == "__main__":
    run_command(main)
