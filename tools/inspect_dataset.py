"""Look through a training set: images and classes, damaged images, duplicates, overlap with other sets:

python tools/inspect_dataset.py --data_path=data/faces_emore --output=inspection [--other=ANOTHER_SET]

Verification sets in the folder are compared with it too. inspection/ gets report.json and images_per_class.png.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json

import numpy as np

from data import inspection, open_dataset
from data.convert import make_folder
from data.pairs import find_pair_sets, load_pairs
from runtime.files import write_json
from runtime.log import Parser, run_command


class Pixels:
    """row -> image of a set that gives (image, class); it is sent to worker processes."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __call__(self, row: int):
        return self.dataset[row][0]


def inspect(data_path: str, others: list[str], workers=None) -> dict:
    dataset = open_dataset(data_path)
    found = inspection.fingerprints(Pixels(dataset), len(dataset), workers, Path(data_path).name)
    counts = np.bincount(dataset.labels[dataset.labels >= 0], minlength=dataset.num_classes)

    def named(pairs, describe=dataset.describe):
        return [[dataset.describe(a), describe(b)] for a, b in pairs]

    report = {
        "data_path": str(data_path),
        "images": len(dataset),
        "classes": dataset.num_classes,
        "classes_without_images": int((counts == 0).sum()),
        "images_per_class": {"least": int(counts.min()), "median": float(np.median(counts)), "most": int(counts.max())},
        "damaged": list(found.damaged.values()),
        "exact_duplicates": named(inspection.equal_pairs(found)),
        "near_duplicates": named(inspection.near_pairs(found)),
        "overlap": {},
    }
    folder = Path(data_path) if Path(data_path).is_dir() else Path(data_path).parent
    sets = {name: load_pairs(path)[0] for name, path in find_pair_sets(folder).items()}
    sets.update({name: open_dataset(name) for name in others})
    for name, images in sets.items():
        read = Pixels(images) if name in others else images.__getitem__
        describe = images.describe if name in others else lambda row, name=name: f"{name} image {row} (pair {row // 2})"
        theirs = inspection.fingerprints(read, len(images), workers, name)
        report["overlap"][name] = {
            "images": len(images),
            "exact": named(inspection.equal_pairs(found, theirs), describe),
            "near": named(inspection.near_pairs(found, theirs), describe),
        }
    return {**report, "counts": counts}


def save_plot(counts, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=150, constrained_layout=True)
    axes = figure.add_subplot()
    axes.hist(counts, bins=min(60, int(counts.max()) + 1))
    axes.set(xlabel="images of a class", ylabel="classes")
    figure.savefig(path)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="a training set of any format")
    parser.add_argument("--other", nargs="*", default=[], help="other training sets to compare with")
    parser.add_argument("--output", default="", help="folder for report.json and the plot")
    parser.add_argument("--workers", type=int, default=None, help="processes [one a core]")
    options = parser.parse_args()
    report = inspect(options.data_path, options.other, options.workers)
    counts = report.pop("counts")
    if options.output:
        folder = make_folder(options.output)
        write_json(folder / "report.json", report)
        save_plot(counts, folder / "images_per_class.png")
    shown = {key: len(value) if isinstance(value, list) else value for key, value in report.items()}
    shown["overlap"] = {
        name: {key: len(value) if isinstance(value, list) else value for key, value in one.items()}
        for name, one in report["overlap"].items()
    }
    print(json.dumps(shown, indent=2))


if __name__ == "__main__":
    run_command(main)
