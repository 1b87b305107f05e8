"""Make a verification set of people: as many pairs of one person as of two, chosen by a seed:

python tools/make_pairs.py --image_path=people --output=lfw.bin --pairs=6000
python tools/make_pairs.py --image_path=lfw --pairs_txt=pairs.txt --output=lfw.bin

people/ holds one folder a person, with aligned faces of 112x112.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import pair_making
from runtime.log import Parser, run_command


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_path", required=True, help="folder with one folder of images a person")
    parser.add_argument("--output", required=True, help="the .bin to write")
    parser.add_argument("--pairs_txt", default=None, help="take the pairs of this list, as LFW's pairs.txt")
    parser.add_argument("--pairs", type=int, default=6000, help="how many pairs to choose [6000]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=None, help="processes [one a core]")
    options = parser.parse_args()
    if options.pairs_txt:
        pairs = pair_making.pairs_of_list(options.pairs_txt, options.image_path)
    else:
        pairs = pair_making.pairs_of_folder(options.image_path, options.pairs, options.seed)
    pair_making.write_pairs(options.output, pairs, options.workers)
    print(f"{options.output}: {len(pairs)} pairs, {sum(same for _a, _b, same in pairs)} of one person")


if __name__ == "__main__":
    run_command(main)
