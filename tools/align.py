"""Photos to aligned faces: `python -m tools.align --input photos/ --output aligned/`.

Folders keep their names, so that photos/<person>/<photo> becomes a training set. Interrupted, it goes on where it
stood. align_report.html in the output folder shows what was found, what not, and why.
"""

from __future__ import annotations

from deploy.detection import check_size
from deploy.photo_set import FACES, REPORT, Settings, align_folder
from runtime.errors import ConfigError
from runtime.log import Parser, run_command


def main() -> int:
    parser = Parser(prog="python -m tools.align", description=__doc__.splitlines()[0])
    default = Settings()
    parser.add_argument("--input", required=True, help="folder of photos, searched below too")
    parser.add_argument("--output", required=True, help="folder for the faces; made if missing")
    parser.add_argument("--det_model", default="", help="an ONNX detector (YuNet, SCRFD, RetinaFace); else MTCNN")
    parser.add_argument("--det_thresh", type=float, default=default.det_thresh, help="least score of a face")
    parser.add_argument("--faces", choices=FACES, default=default.faces, help="of each photo")
    parser.add_argument("--min_face", type=int, default=default.min_face, help="least side of a face in pixels")
    parser.add_argument("--size", type=int, default=default.size, help="side of an aligned face")
    parser.add_argument(
        "--det_size",
        type=int,
        default=default.det_size,
        help="long side to which photos are reduced to find faces: more for tiny ones",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 for every core")
    args = parser.parse_args()
    if not 16 <= args.size <= 1024:
        raise ConfigError(f"--size {args.size}: from 16 to 1024 pixels (112 is what the networks here take)")
    if not 0 <= args.det_thresh <= 1:
        raise ConfigError(f"--det_thresh {args.det_thresh}: from 0 to 1")
    check_size(args.det_size)
    settings = Settings(args.det_model, args.det_thresh, args.faces, args.min_face, args.size, args.det_size)
    ends = align_folder(args.input, args.output, settings, args.workers)
    for end, count in ends.most_common():
        print(f"{count:8d}  {end}")
    print(f"report: {args.output}/{REPORT}")
    return 0 if ends["aligned"] else 1


if __name__ == "__main__":
    run_command(main)
