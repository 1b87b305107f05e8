"""Pack a folder of people into train.rec, train.idx and property, some of them apart for verification:

python tools/images_2_recordio.py --image_path=people --output_dir=data/mine --val_share=0.1

people/ holds one folder a person, with aligned faces of 112x112 (tools.align makes them of photos). The people set
apart are in no training image; pairs of them go into val.bin, and their names into val_people.txt, for tools.calibrate.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import random

from data import convert, pair_making
from data.folder import class_names
from runtime.errors import DataError
from runtime.files import write_text
from runtime.log import Parser, run_command

PAIRS = (1000, 600, 400, 200, 100, 60, 40, 20)  # what is tried; ten folds need twenty


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_path", required=True, help="folder with one folder of images a person")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--val_share", type=float, default=0.0, help="share of the people set apart [0]")
    parser.add_argument("--val_pairs", type=int, default=0, help="pairs of them in val.bin [1000, of few people less]")
    parser.add_argument("--seed", type=int, default=0, help="who is set apart, and the pairs")
    parser.add_argument("--workers", type=int, default=None, help="processes [one a core]")
    options = parser.parse_args()
    if not 0 <= options.val_share < 1:
        raise DataError(f"--val_share {options.val_share}: must be from 0 up to, but not including, 1")
    names = class_names(options.image_path)
    people = list(range(len(names)))
    random.Random(options.seed).shuffle(people)
    apart = max(round(options.val_share * len(people)), 2) if options.val_share else 0
    if len(people) - apart < 2 and apart:
        raise DataError(f"{options.image_path}: holds {len(people)} people: two to train on and two apart are needed")
    pairs = _pairs(options, people[:apart]) if apart else []
    output = convert.make_folder(options.output_dir)
    if apart:
        pair_making.write_pairs(output / "val.bin", pairs, options.workers)
        write_text(output / "val_people.txt", "".join(f"{names[i]}\n" for i in sorted(people[:apart])), DataError)
    images = convert.folder_to_recordio(options.image_path, output, people[apart:], options.workers)
    print(f"{output}: {images} images of {len(people) - apart} people to train on, {apart} people apart")


def _pairs(options, people: list) -> pair_making.Pairs:
    for count in [options.val_pairs] if options.val_pairs else PAIRS:
        try:
            return pair_making.pairs_of_folder(options.image_path, count, options.seed, people)
        except DataError as error:
            last = error
    raise last


if __name__ == "__main__":
    run_command(main)
