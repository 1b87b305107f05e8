"""What the ranks do in the tests of verify/."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from data import pairs
from recognizer import Recognizer
from runtime.device import Device
from verify.embed import embed_images, verify
from verify.protocol import evaluate_pairs

CPU = Device("cpu")


def small_net(seed: int = 0) -> nn.Module:
    """[B, 3, 8, 8] -> [B, 16], with what training and evaluation treat differently."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.PReLU(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, 16)
    )
    net(torch.randn(64, 3, 8, 8))  # statistics that are not the initial ones
    return net


def noise_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def to_input(images_BHWC):
    return images_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


class Recorded:
    """Images that remember which of them were asked for."""

    def __init__(self, images):
        self.images, self.asked = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        self.asked += range(len(self.images))[rows]
        return self.images[rows]


def embedded(world, count, batch_size, flip_sum):
    """(embeddings, accuracy of their pairs, the images that this rank asked for)."""
    images = Recorded(noise_images(count))
    emb = embed_images(small_net(), images, CPU, world, batch_size, flip_sum, to_input=to_input)
    issame = np.arange(count // 2) % 3 == 0
    return emb, evaluate_pairs(emb, issame).accuracy, images.asked


def verified_while_training(world):
    """Verification between two steps of DistributedDataParallel, with fewer batches than ranks."""
    net = nn.parallel.DistributedDataParallel(small_net())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    accuracies = []
    for step in range(2):
        loss = net(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))).square().mean()
        loss.backward()
        optimizer.step()
        sets = {"noise": (noise_images(40), [True, False] * 10)}
        accuracies.append(verify(net, sets, CPU, world, batch_size=32, to_input=to_input)["noise"].accuracy)
    return accuracies, net.training


def evaluated(world, config):
    """What evaluate.py does on this rank; the accuracies by set."""
    import evaluate

    results = evaluate.evaluate(config, evaluate.find_sets(config), CPU, world)
    return {name: result.accuracy for name, result in results.items()}


def evaluated_by_recognizer(world, path, pair_set):
    """Embeddings' bytes, accuracy and threshold of a saved recognizer, and its fingerprint afterwards."""
    recognizer = Recognizer.load(path, CPU, world=world)
    images, _ = pairs.load_pairs(pair_set)
    result = recognizer.verify({"lfw": pair_set}, world, batch_size=3)["lfw"]
    embeddings = recognizer.embed(images, world, batch_size=3)
    return embeddings.tobytes(), result.accuracy, result.threshold, recognizer.fingerprint
