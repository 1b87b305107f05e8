"""An int8 file of an ONNX recognizer, for a quicker server on the CPU.

python -m tools.quantise --model model.onnx --images aligned/ --pairs lfw.bin --output model_int8.onnx
"""

from __future__ import annotations

from deploy.quantise import quantise
from runtime.log import Parser, run_command, setup_logging


def main() -> None:
    parser = Parser(prog="python -m tools.quantise", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="an ONNX file")
    parser.add_argument("--images", required=True, help="a folder of aligned faces, or a pair set: ranges are theirs")
    parser.add_argument("--count", type=int, default=100, help="images that are looked at")
    parser.add_argument("--pairs", default="", help="a pair set on which less than 0.1 points may be lost")
    parser.add_argument("--channel_order", choices=("rgb", "bgr"), help="of the pair set, where nothing beside it says")
    parser.add_argument("--output", required=True, help="the file to write")
    args = parser.parse_args()
    setup_logging()
    print(quantise(args.model, args.output, args.images, args.pairs, args.channel_order, max(args.count, 1)))
    print(f"written to {args.output}: calibrate it, and make galleries anew")


if __name__ == "__main__":
    run_command(main)
