"""The loader beside PIL + ToTensor + Normalize, from the same .rec, on one core, taking turns in one run.

    python -m benchmark.loader --data_path DIR [--batch_size 128] [--rounds 5] [--output benchmark/results]

Three ways to get batches: the older projects' (record, PIL, torchvision's ToTensor and Normalize, DataLoader's own
collation), this project's loader (uint8 batches: flip and normalisation are the device's work), and this project's
loader with that work done on the same core, for those who train on it. Rates are images per second of CPU time, so
that other programs on the machine do not count; each is the best of the rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version
from torch.utils.data import DataLoader, Dataset

from benchmark.record import write_record
from data import build_loader, images, open_dataset, synthetic
from data.recordio import RecordIOReader, unpack
from data.transforms import to_input
from runtime import log
from runtime.device import Device

try:
    from torchvision import transforms
except ImportError:
    transforms = None


def plain_transform():
    """ToTensor and Normalize: torchvision's, or the same arithmetic where it is not installed."""
    if transforms is not None:
        return transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    mean = std = torch.full((3, 1, 1), 0.5)
    return lambda image: (
        torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255).sub_(mean).div_(std)
    )


class PlainDataset(Dataset):
    """Every image by itself: read the record, decode with PIL, make a normalised float tensor."""

    def __init__(self, folder: Path, count: int):
        self.reader = RecordIOReader(folder / "train.rec", folder / "train.idx")
        self.count, self.transform = count, plain_transform()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        labels, data = unpack(self.reader.read(index + 1))
        return self.transform(Image.open(io.BytesIO(data)).convert("RGB")), int(labels[0])


def measure(run, images_per_round: int) -> tuple[float, float]:
    """(images per CPU second, images per second) of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return images_per_round / (time.process_time() - cpu), images_per_round / (time.perf_counter() - wall)


def compare(folder: Path, batch_size: int, rounds: int) -> dict:
    """{way: {"images_per_cpu_s", "images_per_s"}}, the best of `rounds` for each."""
    dataset = open_dataset(folder)
    ours = build_loader(dataset, batch_size)
    plain = DataLoader(PlainDataset(folder, len(dataset)), batch_size, shuffle=True, drop_last=True)

    def read_plain():
        for _ in plain:
            pass

    def read_ours():
        for _ in ours:
            pass

    def read_ours_to_input():
        for batch in ours:
            to_input(batch.images_BHWC, batch.flip_B)

    ways = {"plain": read_plain, "loader": read_ours, "loader_and_to_input": read_ours_to_input}
    rates = {name: [] for name in ways}
    for run in ways.values():  # caches and lazy imports are paid before the first round
        run()
    for _ in range(rounds):
        for name, run in ways.items():
            rates[name].append(measure(run, len(ours) * batch_size))
    return {
        name: {
            "images_per_cpu_s": round(max(cpu for cpu, _ in found)),
            "images_per_s": round(max(wall for _, wall in found)),
        }
        for name, found in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", type=Path, help="folder with train.rec; synthetic faces by default")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.data_path
        if folder is None:
            folder = Path(scratch) / "faces"
            synthetic.generate(folder)
        dataset = open_dataset(folder)
        mean_bytes = np.mean([len(dataset.encoded(index)[0]) for index in range(len(dataset))])
        ways = compare(folder, options.batch_size, options.rounds)
    plain = ways["plain"]["images_per_cpu_s"]
    record = {
        "images": len(dataset),
        "mean_jpeg_bytes": round(float(mean_bytes)),
        "versions": {
            **log.versions(),
            "pillow": pillow_version,
            "simplejpeg": getattr(images.simplejpeg, "__version__", None),
            "torchvision": transforms is not None,
        },
        "ways": ways,
        "times_faster": round(ways["loader"]["images_per_cpu_s"] / plain, 2),
        "times_faster_with_to_input": round(ways["loader_and_to_input"]["images_per_cpu_s"] / plain, 2),
    }
    print(json.dumps(record, indent=2))
    command = f"python -m benchmark.loader --data_path {folder.name if options.data_path else '(synthetic)'} "
    command += f"--batch_size {options.batch_size} --rounds {options.rounds}"
    write_record("loader", record, Device("cpu"), options.output, command)


if __name__ == "__main__":
    main()
