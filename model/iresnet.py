"""The improved residual nets of face recognition, in the two forms whose weights people have.

`IRNet` is the net of InsightFace_Pytorch and of Ascend's LResNet100E-IR (`ir`, and `ir_se` with squeeze and
excitation); `IResNet` is arcface_torch's (`iresnet`). Both follow arXiv 1801.07698, section 3.1: a 3x3 stem at full
resolution, four stages which each halve the resolution, and batch norm - dropout - linear - batch norm on the
512 x 7 x 7 map. They differ inside the unit and in the shortcut, so that neither's weights fit the other.
Attribute names are those of the two upstream projects, because they are the keys of the published state dicts.

Shapes: B images, C channels, H height, W width, D embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.layers import BatchNorm2d, PReLU, SqueezeExcite, Subsample, conv, l2_normalize

# units of each of the four stages
STAGE_UNITS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    152: (3, 8, 36, 3),
    200: (6, 26, 60, 6),
}
STAGE_WIDTHS = (64, 128, 256, 512)
STEM_WIDTH = 64
MAP_SIZE = 7  # 112 halved by four stages


def stage_plan(stage_units, stage_widths, in_width):
    """The four stages as lists of (in_channels, out_channels, stride): a stage's first unit halves the resolution."""
    plan = []
    for units, width in zip(stage_units, stage_widths):
        plan.append([(in_width, width, 2)] + [(width, width, 1)] * (units - 1))
        in_width = width
    return plan


class IRUnit(nn.Module):
    """bn - conv - prelu - conv(stride) - bn [- SE], plus a shortcut that has weights only where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, squeeze_excite: bool):
        super().__init__()
        if in_channels != out_channels:
            self.shortcut_layer = nn.Sequential(
                conv(in_channels, out_channels, 1, stride),
                BatchNorm2d(out_channels),
            )
        elif stride != 1:
            self.shortcut_layer = Subsample(stride)
        else:
            self.shortcut_layer = nn.Identity()
        layers = [
            BatchNorm2d(in_channels),
            conv(in_channels, out_channels, 3),
            PReLU(out_channels),
            conv(out_channels, out_channels, 3, stride),
            BatchNorm2d(out_channels),
        ]
        if squeeze_excite:
            layers.append(SqueezeExcite(out_channels))
        self.res_layer = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.res_layer(x_BCHW) + self.shortcut_layer(x_BCHW)


class IRNet(nn.Module):
    """[B, 3, 112, 112] -> [B, D]: LResNet-E-IR, with squeeze and excitation if asked for."""

    def __init__(
        self,
        depth: int,
        embedding_size: int = 512,
        dropout: float = 0.6,
        l2_norm: bool = True,
        squeeze_excite: bool = False,
    ):
        super().__init__()
        width = STAGE_WIDTHS[-1]
        # the output layer before the body: the upstream project's order of parameters, by which its optimizer states
        # are indexed
        self.input_layer = nn.Sequential(conv(3, STEM_WIDTH, 3), BatchNorm2d(STEM_WIDTH), PReLU(STEM_WIDTH))
        self.output_layer = nn.Sequential(
            BatchNorm2d(width),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(width * MAP_SIZE * MAP_SIZE, embedding_size),
            nn.BatchNorm1d(embedding_size),
        )
        self.body = nn.Sequential(
            *(
                IRUnit(*shape, squeeze_excite=squeeze_excite)
                for stage in stage_plan(STAGE_UNITS[depth], STAGE_WIDTHS, STEM_WIDTH)
                for shape in stage
            )
        )
        self.l2_norm = l2_norm

    def forward(self, x_BCHW: Tensor) -> Tensor:
        emb_BD = self.output_layer(self.body(self.input_layer(x_BCHW)))
        return l2_normalize(emb_BD) if self.l2_norm else emb_BD


class IResNetUnit(nn.Module):
    """bn - conv - bn - prelu - conv(stride) - bn, plus a shortcut of conv - bn wherever the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, eps: float, shared_slope: bool):
        super().__init__()
        self.bn1 = BatchNorm2d(in_channels, eps=eps)
        self.conv1 = conv(in_channels, out_channels, 3)
        self.bn2 = BatchNorm2d(out_channels, eps=eps)
        self.prelu = PReLU(1 if shared_slope else out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, stride)
        self.bn3 = BatchNorm2d(out_channels, eps=eps)
        self.downsample = projection(in_channels, out_channels, stride, eps)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.prelu(self.bn2(self.conv1(self.bn1(x_BCHW))))
        return self.bn3(self.conv2(y_BCHW)) + self.downsample(x_BCHW)


def projection(in_channels: int, out_channels: int, stride: int, eps: float) -> nn.Module:
    """The shortcut of a unit that changes the width or the resolution; nothing to learn in the others."""
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), BatchNorm2d(out_channels, eps=eps))


class StagedNet(nn.Module):
    """[B, 3, 112, 112] -> [B, D]: stem, four stages of `unit`, and the embedding, under arcface_torch's names.

    `unit(in_channels, out_channels, stride, eps, shared_slope)` makes one residual unit; `shared_slope` gives each
    PReLU one slope for all its channels.
    """

    def __init__(
        self,
        unit,
        stage_units,
        stage_widths,
        embedding_size: int,
        dropout: float,
        l2_norm: bool,
        eps: float,
        shared_slope: bool,
    ):
        super().__init__()
        self.conv1 = conv(3, STEM_WIDTH, 3)
        self.bn1 = BatchNorm2d(STEM_WIDTH, eps=eps)
        self.prelu = PReLU(1 if shared_slope else STEM_WIDTH)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(*(unit(*shape, eps=eps, shared_slope=shared_slope) for shape in stage))
            for stage in stage_plan(stage_units, stage_widths, STEM_WIDTH)
        )
        self.bn2 = BatchNorm2d(stage_widths[-1], eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(stage_widths[-1] * MAP_SIZE * MAP_SIZE, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size, eps=eps)
        self.l2_norm = l2_norm

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.prelu(self.bn1(self.conv1(x_BCHW)))
        x_BCHW = self.layer4(self.layer3(self.layer2(self.layer1(x_BCHW))))
        emb_BD = self.features(self.fc(torch.flatten(self.dropout(self.bn2(x_BCHW)), 1)))
        return l2_normalize(emb_BD) if self.l2_norm else emb_BD


class IResNet(StagedNet):
    """arcface_torch's net: convolutions start at N(0, 0.1), the last batch norm has no scale to learn."""

    def __init__(self, depth: int, embedding_size: int = 512, dropout: float = 0.0, l2_norm: bool = False):
        super().__init__(
            IResNetUnit,
            STAGE_UNITS[depth],
            STAGE_WIDTHS,
            embedding_size,
            dropout,
            l2_norm,
            eps=1e-5,
            shared_slope=False,
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)
        # the loss normalises embeddings: a common scale would have no gradient, and weight decay would shrink it
        self.features.weight.requires_grad = False
