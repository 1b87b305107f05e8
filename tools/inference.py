"""Embeddings of aligned faces by an exported ONNX file:

python tools/inference.py --onnx_file=FresResNet50.onnx --image_path=FILE_OR_FOLDER [--output=embeddings.npy]

Prints the shape as arcface_paddle does, and how alike each two of the first images are.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from runtime.errors import ConfigError, DataError
from runtime.files import atomic_file
from runtime.log import run_command

SHOWN = 10  # images whose similarities are printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export_type", default="onnx")
    parser.add_argument("--onnx_file", required=True)
    parser.add_argument("--image_path", required=True, help="an aligned face of 112x112, or a folder of them")
    parser.add_argument("--output", default="embeddings.npy", help="float32 [images, embedding], unit rows")
    options = parser.parse_args()
    if options.export_type != "onnx":
        raise ConfigError(f"--export_type {options.export_type}: inference here is for onnx")
    infer(options)


def infer(options) -> None:
    from data.images import IMAGE_SUFFIXES, decode_image, read_file
    from deploy.backends import OnnxRecognizer
    from runtime.errors import DamagedItem

    place = Path(options.image_path)
    paths = [place] if place.is_file() else sorted(p for p in place.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"--image_path {place}: no image, and no folder of images")
    if Path(options.output).exists() and Path(options.output).suffix != ".npy":
        raise ConfigError(f"--output {options.output}: is there and is no .npy: choose another name")
    recognizer = OnnxRecognizer(options.onnx_file)
    images = np.empty((len(paths), recognizer.size, recognizer.size, 3), np.uint8)
    for image_HWC, path in zip(images, paths):
        try:
            decode_image(read_file(path), out_HWC=image_HWC)
        except DamagedItem as error:
            raise DataError(f"{path}: {error}") from None
    emb_ND = recognizer.embed(images)
    with atomic_file(options.output, DataError) as file:
        np.save(file, emb_ND)
    print("onnx inference result: ", emb_ND.shape)
    for row in range(min(len(paths), SHOWN)):
        for other in range(row + 1, min(len(paths), SHOWN)):
            print(f"similarity {emb_ND[row] @ emb_ND[other]:.4f}  {paths[row].name}  {paths[other].name}")


if __name__ == "__main__":
    run_command(main)
