"""Unpack a verification .bin into PNG files and label.txt (`first<TAB>second<TAB>0 or 1`):

python tools/lfw_style_bin_dataset_converter.py --bin_path lfw.bin --out_dir lfw [--flip_test]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import convert
from runtime.log import Parser, run_command


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin_path", required=True)
    parser.add_argument("--out_dir", required=True)
    parser.add_argument("--flip_test", action="store_true", help="the mirrored pairs too, after the others")
    parser.add_argument("--workers", type=int, default=None, help="processes [one a core]")
    options = parser.parse_args()
    lines = convert.pairs_to_folder(options.bin_path, options.out_dir, options.flip_test, options.workers)
    print(f"{lines} pairs in {options.out_dir}/label.txt")


if __name__ == "__main__":
    run_command(main)
