"""The backbone `tiny`, for tests of what surrounds one: a step takes milliseconds, and its dropout uses the generator.

Importing this file registers it; a command gets it by `--plugin=test/tiny_net.py`.
"""

from __future__ import annotations

from torch import nn

import model


@model.register("tiny", dropout=0.4)
class Tiny(nn.Module):
    """Two strided convolutions and a linear layer, with batch norm."""

    def __init__(self, embedding_size, dropout):
        super().__init__()
        layers, channels = [], 3
        for width, stride in ((8, 8), (16, 2)):
            layers += [nn.Conv2d(channels, width, stride + 1, stride, 1), nn.BatchNorm2d(width), nn.PReLU(width)]
            channels = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout))
        self.output = nn.Sequential(nn.Linear(channels * 7 * 7, embedding_size), nn.BatchNorm1d(embedding_size))

    def forward(self, images_BCHW):
        return self.output(self.body(images_BCHW))
