"""What each way to fine-tune gives on 20 people of 5 photos each, with three seeds.

    python -m benchmark.finetune WEIGHTS SET [--seeds 3] [--rows plain "freeze=3" ...] [--minutes 4]

WEIGHTS: a checkpoint of this project, or the state dict of the public MobileFaceNet of 128 numbers
(foamliu/MobileFaceNet). SET: a training set with at least 50 people of 15 photos.

A seed chooses 20 people of the set, 5 of their photos to train on, the order and the new head. Measured is TAR at FAR
1e-3, the share of the pairs of one person that is accepted where one of a thousand pairs of two people is: over 6
photos of each of the 20 people that were not trained on, and, for what it costs with everybody else, over 10 photos of
each of 30 other people. The rows of unequal numbers train on 1 to 9 photos a person, 5 in the mean.

The record is written after each run, and a second call does only what is missing; --minutes ends one in time.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
from torch import nn
from torch.nn import functional as F

import data
import model
from benchmark.record import RESULTS, write_record
from checkpoint import store
from config import Config, parse_arguments
from learner import Learner
from model.layers import DepthwiseConv2d
from recognizer import Recognizer
from runtime.device import parse_device

PEOPLE, OTHERS, PHOTOS, LEAST = 20, 30, 5, 15
BATCH, EPOCHS, LR, FAR = 20, 5, 0.01, 1e-3
UNTRAINED, UNEQUAL = "as it came", "1 to 9 photos a person"
ALL = "augment=crop,low_resolution,photometric"
ROWS = [
    UNTRAINED,
    "plain",
    "freeze=3",
    "freeze=5",
    "lr_decay_by_part=0.5",
    "freeze=3 lr_decay_by_part=0.5",
    "augment=crop",
    "augment=low_resolution",
    "augment=photometric",
    ALL,
    f"freeze=3 {ALL}",
    UNEQUAL,
    f"{UNEQUAL} class_balanced=true",
]


# --- the public network -----------------------------------------------------------------------------------------------


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, out: int, inner: int, stride: int):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(channels, inner, 1), _conv(inner, inner, 3, stride, inner),
            nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.residual = stride == 1 and channels == out

    def forward(self, x_BCHW):
        return x_BCHW + self.conv(x_BCHW) if self.residual else self.conv(x_BCHW)


def _conv(channels: int, out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    if groups == channels:
        conv = DepthwiseConv2d(out, size, stride, size // 2)
    else:
        conv = nn.Conv2d(channels, out, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6())


class _Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise, self.bn1 = DepthwiseConv2d(64, 3, 1, 1), nn.BatchNorm2d(64)
        self.pointwise, self.bn2 = nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64)

    def forward(self, x_BCHW):
        return F.relu(self.bn2(self.pointwise(F.relu(self.bn1(self.depthwise(x_BCHW))))))


class _WholeFace(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise, self.bn = DepthwiseConv2d(512, 7, 1, 0), nn.BatchNorm2d(512)

    def forward(self, x_BCHW):
        return self.bn(self.depthwise(x_BCHW))


@model.register("mobilefacenet_relu6")
class MobileFaceNetRelu6(nn.Module):
    """MobileFaceNet with ReLU6 under the names of the public weights: [B, 3, 112, 112] -> [B, D]."""

    def __init__(self, embedding_size: int = 128):
        super().__init__()
        self.conv1, self.dw_conv = _conv(3, 64, 3, 2), _Depthwise()
        shapes = [(64, 128, 5, 2), (128, 256, 1, 2), (128, 256, 6, 1), (128, 512, 1, 2), (128, 256, 2, 1)]
        blocks, channels = [], 64
        for out, inner, count, stride in shapes:
            for number in range(count):
                blocks.append(_Bottleneck(channels, out, inner, stride if number == 0 else 1))
                channels = out
        self.features = nn.Sequential(*blocks)
        self.conv2, self.gdconv = _conv(128, 512, 1), _WholeFace()
        self.conv3, self.bn = nn.Conv2d(512, embedding_size, 1), nn.BatchNorm2d(embedding_size)

    def forward(self, x_BCHW):
        x_BCHW = self.conv2(self.features(self.dw_conv(self.conv1(x_BCHW))))
        return self.bn(self.conv3(self.gdconv(x_BCHW))).flatten(1)

    @staticmethod
    def part_of(name: str) -> int:
        """For --freeze and --lr_decay_by_part: the stem, what has 28x28, 14x14, 7x7 positions, and the embedding."""
        first, number = (name + "...").split(".")[:2]
        if first == "features":
            return 1 if int(number) < 5 else 2 if int(number) < 12 else 3
        return {"conv1": 0, "dw_conv": 0, "conv2": 4}.get(first, 5)


def load_start(path, device) -> Recognizer:
    state = store.load_pth(path)
    if "features.0.conv.2.weight" not in state:
        return Recognizer.load(path, device, memory_format="fastest")
    recognizer = Recognizer.create(
        "mobilefacenet_relu6", embedding_size=len(state["bn.weight"]), device=device, memory_format="fastest"
    )
    recognizer.backbone.load_state_dict(state)
    return recognizer


# --- one run ----------------------------------------------------------------------------------------------------------


class Photos(data.ImageDataset):
    """Some images of a set, held in memory."""

    def __init__(self, images_NHWC, labels_N, num_classes: int):
        super().__init__()
        self.images, self._labels, self.num_classes = images_NHWC, labels_N, num_classes

    def __len__(self):
        return len(self.images)

    @property
    def labels(self):
        return self._labels

    def load_into(self, index, out_HWC):
        out_HWC[...] = self.images[index]
        return int(self._labels[index])


def choose(dataset, seed: int, unequal: bool) -> list[Photos]:
    """[to train on, of the same people to measure with, of other people]: no photo in two. The last two are the same
    for every row of a seed."""
    rng = np.random.default_rng(seed)
    people = rng.permutation(np.flatnonzero(np.bincount(dataset.labels, minlength=dataset.num_classes) >= LEAST))
    train, held, others = [], [], []
    for number, person in enumerate(people[: PEOPLE + OTHERS]):
        rows = [(row, number) for row in rng.permutation(np.flatnonzero(dataset.labels == person))]
        if number < PEOPLE:
            train += rows[: 1 + number * 9 // PEOPLE if unequal else PHOTOS]
            held += rows[9:LEAST]
        else:
            others += rows[:10]
    made = []
    for part in (train, held, others):
        images = np.stack([dataset[int(row)][0] for row, _ in part])
        made.append(Photos(images, np.array([number for _, number in part]), PEOPLE))
    return made


def tar_at_far(recognizer, photos: Photos) -> float:
    """Over all pairs of the photos."""
    emb_ND = np.concatenate([recognizer.embed(photos.images[i : i + 100]) for i in range(0, len(photos), 100)])
    first, second = np.triu_indices(len(photos), k=1)
    cosine_P = (emb_ND @ emb_ND.T)[first, second]
    same_P = photos.labels[first] == photos.labels[second]
    different_P = np.sort(cosine_P[~same_P])[::-1]
    return float((cosine_P[same_P] > different_P[int(FAR * len(different_P))]).mean())


def run(row: str, seed: int, options, dataset) -> dict:
    device = parse_device(options.device_type)
    train, held, others = choose(dataset, seed, row.startswith(UNEQUAL))
    recognizer, started = load_start(options.weights, device), time.perf_counter()
    if row != UNTRAINED:
        with tempfile.TemporaryDirectory() as folder:
            words = [
                f"--epochs={options.epochs}", f"--batch_size={BATCH}", f"--lr={options.lr}", f"--seed={seed}",
                f"--milestones={options.epochs * 2 // 3}", "--num_workers=0", "--with_test=false",
                "--tensorboard=false", f"--work_path={folder}", f"--run_dir={folder}/run",
            ]  # fmt: skip
            words += [f"--{word}" for word in row.split() if "=" in word]
            config: Config = parse_arguments(words)
            device.seed(seed)
            learner = Learner(recognizer, config, train)
            learner.train()
    seconds = round(time.perf_counter() - started, 1)
    measured = {"own": tar_at_far(recognizer, held), "others": tar_at_far(recognizer, others)}
    return {"row": row, "seed": seed, "train_seconds": seconds, **measured}


def table(runs: list) -> str:
    lines = ["| options | TAR at FAR 1e-3, other photos of the 20 | of 30 other people | seeds |", "|---|---|---|---|"]
    for row in ROWS:
        found = [one for one in runs if one["row"] == row]
        if found:
            cells = []
            for name in ("own", "others"):
                values = [one[name] for one in found]
                cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            lines.append(f"| {row} | {' | '.join(cells)} | {len(found)} |")
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("weights", "set"):
        parser.add_argument(name)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--minutes", type=float, default=0, help="begin no run after so many minutes; 0: never mind")
    parser.add_argument("--device_type", default="auto")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args(argv)
    logging.disable(logging.INFO)
    settings = {"people": PEOPLE, "photos": PHOTOS, "batch": BATCH, "epochs": options.epochs, "lr": options.lr}
    known = sorted(options.results.glob("*_finetune.json"))
    runs = json.loads(known[-1].read_text())["runs"] if known else []
    dataset, started = data.open_dataset(options.set), time.time()
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for row in options.rows:
            if any((one["row"], one["seed"]) == (row, seed) for one in runs):
                continue
            if options.minutes and time.time() - started > 60 * options.minutes:
                print("more is left: the same command goes on")
                return
            runs.append(run(row, seed, options, dataset))
            print(json.dumps(runs[-1]), flush=True)
            command = "python -m benchmark.finetune WEIGHTS SET"
            write_record("finetune", {**settings, "runs": runs}, parse_device(options.device_type), options.results,
                         command)  # fmt: skip
    print(table(runs))


if __name__ == "__main__":
    main()
