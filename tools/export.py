"""arcface_paddle's export command: python tools/export.py --export_type onnx --checkpoint_dir=DIR --output_dir=DIR"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import export
from plsc.arcface_paddle import word
from runtime.errors import ConfigError
from runtime.log import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--is_static", type=word, default=False, help="an export is a graph in either case")
    parser.add_argument("--export_type", default="onnx", help="onnx, torchscript or pth")
    parser.add_argument("--backbone", default="FresResNet50", help="the name of the file")
    parser.add_argument("--embedding_size", type=int, default=512, help="the checkpoint itself says it")
    parser.add_argument("--checkpoint_dir", default="MS1M_v3_arcface/FresResNet50/24/")
    parser.add_argument("--output_dir", default="MS1M_v3_arcface/FresResNet50/exported_model")
    options = parser.parse_args()
    if options.export_type == "paddle":
        raise ConfigError("--export_type paddle: Paddle's own format is not written: use --export_type onnx")
    print(f"Load checkpoint from '{options.checkpoint_dir}'.")
    from deploy.onnx import TYPES

    output = Path(options.output_dir) / f"{options.backbone}{TYPES.get(options.export_type, '')}"
    export.export(
        argparse.Namespace(
            pth_path=options.checkpoint_dir, export_type=options.export_type, output=str(output), images="",
            weights_channel_order=None,
        )
    )  # fmt: skip
    print(f"Save exported model to '{options.output_dir}'.")


if __name__ == "__main__":
    run_command(main)
