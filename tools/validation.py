"""arcface_paddle's validation command: python tools/validation.py --checkpoint_dir=DIR --data_dir=./MS1M_v3_bin"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plsc.arcface_paddle import say, word
from runtime.errors import DataError
from runtime.log import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--is_static", type=word, default=False, help="the compiled graph, or eager")
    parser.add_argument("--backbone", default="FresResNet50", help="the checkpoint itself says which it is")
    parser.add_argument("--embedding_size", type=int, default=512, help="likewise")
    parser.add_argument("--checkpoint_dir", default="MS1M_v3_arcface/FresResNet50/24/")
    parser.add_argument("--data_dir", default="./MS1M_v3_bin")
    parser.add_argument("--val_targets", default="lfw,cfp_fp,agedb_30")
    parser.add_argument("--batch_size", type=int, default=128)
    validate(parser.parse_args())


def validate(options) -> None:
    import time

    from data import pairs
    from plsc.trainer import x_norm
    from recognizer import Recognizer
    from runtime.dist import ALONE

    logging.basicConfig(level=logging.INFO, format="Validation: %(asctime)s - %(message)s")
    names = [name.strip() for name in options.val_targets.split(",") if name.strip()]
    sets = pairs.find_pair_sets(options.data_dir, names)
    missing = [name for name in names if name not in sets]
    if not sets:
        raise DataError(f"{options.data_dir}: holds no verification set {', '.join(missing)}: correct --data_dir")
    for name in missing:
        logging.info("%s has no verification set %s", options.data_dir, name)
    recognizer = Recognizer.load(options.checkpoint_dir)
    if options.is_static:
        recognizer.backbone = recognizer.device.compiled(recognizer.backbone)
    for name, path in sets.items():
        started = time.time()
        with x_norm(recognizer, ALONE) as norm:
            result = recognizer.verify({name: path}, batch_size=options.batch_size, flip_sum=True)[name]
        say(name, 1, norm(), result, result.accuracy, time.time() - started)


if __name__ == "__main__":
    run_command(main)
