"""The backbones once more, written with torch.nn alone: the plain formulation that speed is measured against.

The attribute names are those of the state dicts, so that the benchmarks can load one net's weights into the other and
see that both compute the same before they time them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

UNITS = {50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}  # residual units of the four stages, by depth
WIDTHS = (64, 128, 256, 512)


def stages(make_unit, depth: int) -> list[nn.Sequential]:
    """The four stages; make_unit(before, width, stride) builds one unit."""
    made, before = [], 64
    for width, count in zip(WIDTHS, UNITS[depth]):
        units = [make_unit(before, width, 2)] + [make_unit(width, width, 1) for _ in range(count - 1)]
        made.append(nn.Sequential(*units))
        before = width
    return made


class SqueezeExcite(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Conv2d(width, width // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(width // 16, width, 1, bias=False)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Unit(nn.Module):
    def __init__(self, before: int, width: int, stride: int, squeeze_excite: bool):
        super().__init__()
        if before != width:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        else:
            self.shortcut_layer = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.Conv2d(before, width, 3, 1, 1, bias=False),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            *([SqueezeExcite(width)] if squeeze_excite else []),
        )

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class IR(nn.Module):
    def __init__(self, depth: int, squeeze_excite: bool = False, embedding_size: int = 512):
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        body = stages(lambda before, width, stride: Unit(before, width, stride, squeeze_excite), depth)
        self.body = nn.Sequential(*(unit for stage in body for unit in stage))
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.6),
            nn.Flatten(),
            nn.Linear(512 * 7 * 7, embedding_size),
            nn.BatchNorm1d(embedding_size),
        )

    def forward(self, x):
        return F.normalize(self.output_layer(self.body(self.input_layer(x))))


class IResNetUnit(nn.Module):
    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return y + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    def __init__(self, depth: int, embedding_size: int = 512):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(IResNetUnit, depth)
        self.bn2 = nn.BatchNorm2d(512)
        self.fc = nn.Linear(512 * 7 * 7, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad = False

    def forward(self, x):
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.bn2(x).flatten(1)))


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


PLAIN = {
    "ir_50": lambda: IR(50),
    "ir_100": lambda: IR(100),
    "ir_se_50": lambda: IR(50, squeeze_excite=True),
    "ir_se_100": lambda: IR(100, squeeze_excite=True),
    "iresnet_50": lambda: IResNet(50),
    "iresnet_100": lambda: IResNet(100),
    "mobilefacenet": MobileFaceNet,
}
