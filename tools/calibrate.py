"""A threshold for a false-accept rate, written into the model file.

python -m tools.calibrate --model model.pth --pairs lfw.bin --far 1e-3
python -m tools.calibrate --model model.onnx --pairs aligned/ --far 1e-2     (a folder <person>/<aligned face>)
"""

from __future__ import annotations

from deploy.backends import load_recognizer
from deploy.calibration import calibrate, write_calibration
from runtime.log import Parser, run_command, setup_logging


def main() -> None:
    parser = Parser(prog="python -m tools.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", "--pth_path", default="work_space", help="a checkpoint, or a folder: its newest")
    parser.add_argument("--pairs", required=True, help="a pair set, or a folder <person>/<aligned face>")
    parser.add_argument("--far", type=float, default=1e-3, help="false-accept rate")
    parser.add_argument("--output", default="", help="write a copy there instead of into the model file")
    parser.add_argument("--device", default=None, help="cpu, cuda:0, npu:0; the first that is there by default")
    parser.add_argument("--channel_order", choices=("rgb", "bgr"), help="of the pair set, where nothing beside it says")
    args = parser.parse_args()
    setup_logging()
    path, recognizer = load_recognizer(args.model, args.device)
    calibration = calibrate(recognizer, args.pairs, args.far, args.channel_order)
    print(calibration)
    print(f"written to {write_calibration(recognizer, path, calibration, args.output)}")


if __name__ == "__main__":
    run_command(main)
