"""ir and mobilefacenet once more, written with torch.nn alone: the plain formulation that speed is measured against.

The attribute names are those of the state dicts, so that the benchmarks can load one net's weights into the other and
see that both compute the same before they time them.
"""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

IR_50 = ((64, 3), (128, 4), (256, 14), (512, 3))  # width and units of each stage


class Unit(nn.Module):
    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        if before != width:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        else:
            self.shortcut_layer = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.Conv2d(before, width, 3, 1, 1, bias=False),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class IR50(nn.Module):
    def __init__(self, embedding_size: int = 512):
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        units, before = [], 64
        for width, count in IR_50:
            units += [Unit(before, width, 2)] + [Unit(width, width, 1) for _ in range(count - 1)]
            before = width
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.6),
            nn.Flatten(),
            nn.Linear(512 * 7 * 7, embedding_size),
            nn.BatchNorm1d(embedding_size),
        )

    def forward(self, x):
        return F.normalize(self.output_layer(self.body(self.input_layer(x))))


def block(before, width, size=1, stride=1, padding=0, groups=1, prelu=True) -> nn.Sequential:
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(before, width, size, stride, padding, groups=groups, bias=False))
    block.add_module("bn", nn.BatchNorm2d(width))
    if prelu:
        block.add_module("prelu", nn.PReLU(width))
    return block


class Bottleneck(nn.Module):
    def __init__(self, before, width, inner, stride):
        super().__init__()
        self.conv = block(before, inner)
        self.conv_dw = block(inner, inner, 3, stride, 1, groups=inner)
        self.project = block(inner, width, prelu=False)
        self.stride = stride

    def forward(self, x):
        y = self.project(self.conv_dw(self.conv(x)))
        return x + y if self.stride == 1 else y


class Stack(nn.Module):
    def __init__(self, width, inner, count):
        super().__init__()
        self.model = nn.Sequential(*(Bottleneck(width, width, inner, 1) for _ in range(count)))

    def forward(self, x):
        return self.model(x)


class MobileFaceNet(nn.Sequential):
    def __init__(self, embedding_size: int = 512):
        super().__init__()
        self.conv1 = block(3, 64, 3, 2, 1)
        self.conv2_dw = block(64, 64, 3, 1, 1, groups=64)
        self.conv_23 = Bottleneck(64, 64, 128, 2)
        self.conv_3 = Stack(64, 128, 4)
        self.conv_34 = Bottleneck(64, 128, 256, 2)
        self.conv_4 = Stack(128, 256, 6)
        self.conv_45 = Bottleneck(128, 128, 512, 2)
        self.conv_5 = Stack(128, 256, 2)
        self.conv_6_sep = block(128, 512)
        self.conv_6_dw = block(512, 512, 7, groups=512, prelu=False)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(512, embedding_size, bias=False)
        self.bn = nn.BatchNorm1d(embedding_size)

    def forward(self, x):
        return F.normalize(super().forward(x))
