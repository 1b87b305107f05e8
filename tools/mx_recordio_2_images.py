"""Unpack an InsightFace training set into images and label.txt, as arcface_paddle lays it out:

python tools/mx_recordio_2_images.py --root_dir ms1m-retinaface-t1/ --output_dir MS1M_v3/

The images keep their bytes. Run again after an interruption, it goes on where it stopped. MXNet is not needed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import convert
from runtime.files import write_text
from runtime.log import Parser, run_command


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--root_dir", required=True, help="folder with train.rec, train.idx and verification .bin files"
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--workers", type=int, default=None, help="processes [one a core]")
    options = parser.parse_args()
    root, output = Path(options.root_dir), convert.make_folder(options.output_dir)
    images, classes, damaged = convert.recordio_to_list(root / "train.rec", output, options.workers)
    for line in damaged:
        print(f"left out {line}", file=sys.stderr)
    sets = convert.copy_pair_sets(root, output)
    write_text(output / "README.md", f"num_image: {images}\nnum_classes: {classes}\n")
    print(
        f"{images} images of {classes} classes, {len(damaged)} damaged; verification sets: {', '.join(sets) or 'none'}"
    )


if __name__ == "__main__":
    run_command(main)
