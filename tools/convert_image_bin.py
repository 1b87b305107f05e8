"""Pack every image of a folder into a .bin file of its own, or unpack them; label.txt is left alone:

python tools/convert_image_bin.py --image_path=images --bin_path=bins --mode=image2bin
python tools/convert_image_bin.py --image_path=images --bin_path=bins --mode=bin2image

The bytes of an image are those of its file, both ways. In either mode --image_path is the folder of images and
--bin_path that of bins; the other order of the document, where bin2image names the input first, is understood too.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import convert
from runtime.log import Parser, run_command


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_path", required=True, help="folder of the images")
    parser.add_argument("--bin_path", required=True, help="folder of the .bin files")
    parser.add_argument("--mode", required=True, choices=("image2bin", "bin2image"))
    parser.add_argument("--workers", type=int, default=None, help="processes [one a core]")
    options = parser.parse_args()
    if options.mode == "image2bin":
        convert.images_to_bins(options.image_path, options.bin_path, options.workers)
    else:
        bins, images = options.bin_path, options.image_path
        if not any(Path(bins).glob("*.bin")) and any(Path(images).glob("*.bin")):
            bins, images = images, bins
        convert.bins_to_images(bins, images, options.workers)
    print("ok..")


if __name__ == "__main__":
    run_command(main)
