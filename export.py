"""Export a network for other programs: `python export.py --pth_path=model.pth --export_type=onnx --output=model.onnx`

The weights may be this project's or a known upstream project's. The file takes float32 images [B, 3, 112, 112] as
(pixel - 127.5) / 127.5; its metadata say the rest. It is compared with the checkpoint before it gets its name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime.errors import ConfigError
from runtime.log import run_command, setup_logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pth_path", required=True, help="a checkpoint, or a folder of them")
    parser.add_argument("--export_type", default="onnx", help="onnx, torchscript or pth")
    parser.add_argument("--output", default="", help="the file; by default beside the checkpoint")
    parser.add_argument("--images", default="", help="a training set or a folder of aligned faces to check it with")
    parser.add_argument("--weights_channel_order", default=None, choices=("rgb", "bgr"))
    export(parser.parse_args())


def export(options) -> Path:
    # torch and what stands on it only now: --help answers at once
    from checkpoint import run
    from deploy import onnx
    from model import foreign
    from recognizer import Recognizer

    setup_logging()
    if options.export_type not in onnx.TYPES:
        raise ConfigError(f"--export_type {options.export_type}: choose from {', '.join(onnx.TYPES)}")
    path, state = run.read(options.pth_path)
    recognizer = Recognizer.from_state(state, path, "cpu", options.weights_channel_order)
    upstream = "" if "meta" in state else foreign.recognise(state, place=path).upstream
    suffix = onnx.TYPES[options.export_type]
    output = Path(options.output) if options.output else path.with_name(f"{recognizer.name}_exported{suffix}")
    made = onnx.export(recognizer, output, options.export_type, read_images(options.images), upstream)
    print(f"{made}: {recognizer.name}, agrees with {path}")
    return made


def read_images(place: str, most: int = 16):
    """Up to `most` images of a training set, or of a folder of aligned faces, uint8 [N, 112, 112, 3]; None for none."""
    if not place:
        return None
    import numpy as np

    from data import open_dataset
    from data.images import IMAGE_SUFFIXES, decode_image, read_file
    from runtime.errors import DamagedItem, DataError

    found = [path for path in sorted(Path(place).glob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        dataset = open_dataset(place)
        return np.stack([dataset[row][0] for row in range(0, len(dataset), max(1, len(dataset) // most))][:most])
    images_NHWC = np.empty((min(most, len(found)), 112, 112, 3), np.uint8)
    for image_HWC, path in zip(images_NHWC, found):
        try:
            decode_image(read_file(path), out_HWC=image_HWC)
        except DamagedItem as error:
            raise DataError(f"{path}: {error}") from None
    return images_NHWC


if __name__ == "__main__":
    run_command(main)
