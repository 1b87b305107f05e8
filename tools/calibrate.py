"""A threshold for a false-accept rate, written into the model file.

python -m tools.calibrate --model model.pth --pairs lfw.bin --far 1e-3
python -m tools.calibrate --model model.onnx --pairs aligned/ --far 1e-2     (a folder <person>/<aligned face>)
python -m tools.calibrate --pairs aligned/ --people data/mine/val_people.txt --far 1e-2

The last takes only the people that images_2_recordio set apart: a network knows those that it was trained on too well.
"""

from __future__ import annotations

from deploy.backends import load_recognizer
from deploy.calibration import calibrate, write_calibration
from runtime.files import open_regular
from runtime.log import Parser, run_command, setup_logging


def main() -> None:
    parser = Parser(prog="python -m tools.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", "--pth_path", default="work_space", help="a checkpoint, or a folder: its newest")
    parser.add_argument("--pairs", required=True, help="a pair set, or a folder <person>/<aligned face>")
    parser.add_argument("--people", help="a file with the names of the folders to take, one a line; all by default")
    parser.add_argument(
        "--far", type=float, nargs="+", default=[1e-3], help="false-accept rate; of several the first with enough pairs"
    )
    parser.add_argument("--output", default="", help="write a copy there instead of into the model file")
    parser.add_argument("--device", default=None, help="cpu, cuda:0, npu:0; the first that is there by default")
    parser.add_argument("--channel_order", choices=("rgb", "bgr"), help="of the pair set, where nothing beside it says")
    args = parser.parse_args()
    setup_logging()
    people = None
    if args.people:
        with open_regular(args.people) as file:
            people = file.read().decode("utf-8", "replace").splitlines()
    path, recognizer = load_recognizer(args.model, args.device)
    calibration = calibrate(recognizer, args.pairs, args.far, args.channel_order, people=people)
    print(calibration)
    print(f"written to {write_calibration(recognizer, path, calibration, args.output)}")


if __name__ == "__main__":
    run_command(main)
