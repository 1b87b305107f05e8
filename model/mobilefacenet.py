"""MobileFaceNet (arXiv 1804.07573): `MobileFaceNet` under the names of InsightFace_Pytorch's state dict, and `MBF`, the
wider ones of arcface_torch (`mbf`, `mbf_large`) under theirs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.layers import BatchNorm2d, DepthwiseConv2d, PReLU, l2_normalize


class ConvNorm(nn.Module):
    """conv - bn, without an activation: the narrow end of a bottleneck is linear."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 1, stride: int = 1, padding: int = 0, groups=1):
        super().__init__()
        if groups == 1:
            self.conv = nn.Conv2d(in_channels, out_channels, size, stride, padding, bias=False)
        else:
            self.conv = DepthwiseConv2d(out_channels, size, stride, padding)
        self.bn = BatchNorm2d(out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.bn(self.conv(x_BCHW))


class ConvNormPReLU(ConvNorm):
    """conv - bn - prelu."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 1, stride: int = 1, padding: int = 0, groups=1):
        super().__init__(in_channels, out_channels, size, stride, padding, groups)
        self.prelu = PReLU(out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.prelu(self.bn(self.conv(x_BCHW)))


class Bottleneck(nn.Module):
    """Widen to `inner` channels, 3x3 depthwise, narrow again; added to its input where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, inner: int, stride: int):
        super().__init__()
        self.conv = ConvNormPReLU(in_channels, inner)
        self.conv_dw = ConvNormPReLU(inner, inner, size=3, stride=stride, padding=1, groups=inner)
        self.project = ConvNorm(inner, out_channels)
        self.residual = stride == 1

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.project(self.conv_dw(self.conv(x_BCHW)))
        return x_BCHW + y_BCHW if self.residual else y_BCHW


class BottleneckStack(nn.Module):
    """`count` residual bottlenecks of one shape."""

    def __init__(self, channels: int, inner: int, count: int):
        super().__init__()
        self.model = nn.Sequential(*(Bottleneck(channels, channels, inner, stride=1) for _ in range(count)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.model(x_BCHW)


class MobileFaceNet(nn.Module):
    """[B, 3, 112, 112] -> [B, D]; 1.2 M parameters at D = 512."""

    def __init__(self, embedding_size: int = 512, l2_norm: bool = True):
        super().__init__()
        self.conv1 = ConvNormPReLU(3, 64, size=3, stride=2, padding=1)
        self.conv2_dw = ConvNormPReLU(64, 64, size=3, padding=1, groups=64)
        self.conv_23 = Bottleneck(64, 64, inner=128, stride=2)
        self.conv_3 = BottleneckStack(64, inner=128, count=4)
        self.conv_34 = Bottleneck(64, 128, inner=256, stride=2)
        self.conv_4 = BottleneckStack(128, inner=256, count=6)
        self.conv_45 = Bottleneck(128, 128, inner=512, stride=2)
        self.conv_5 = BottleneckStack(128, inner=256, count=2)
        self.conv_6_sep = ConvNormPReLU(128, 512)
        # a learned weighting of the 7x7 positions in place of their mean: face parts are not interchangeable
        self.conv_6_dw = ConvNorm(512, 512, size=7, groups=512)
        self.linear = nn.Linear(512, embedding_size, bias=False)
        self.bn = nn.BatchNorm1d(embedding_size)
        self.l2_norm = l2_norm

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv2_dw(self.conv1(x_BCHW))
        x_BCHW = self.conv_3(self.conv_23(x_BCHW))
        x_BCHW = self.conv_4(self.conv_34(x_BCHW))
        x_BCHW = self.conv_5(self.conv_45(x_BCHW))
        x_BC11 = self.conv_6_dw(self.conv_6_sep(x_BCHW))
        emb_BD = self.bn(self.linear(torch.flatten(x_BC11, 1)))
        return l2_normalize(emb_BD) if self.l2_norm else emb_BD


# --- arcface_torch's -------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """A sequence under the name `layers`, with the input added to what comes out if asked for."""

    def __init__(self, *layers: nn.Module, residual: bool = False):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


def conv_norm(in_channels: int, out_channels: int, size: int = 1, stride: int = 1, padding: int = 0, groups: int = 1):
    """conv - bn, as a list."""
    if groups == in_channels == out_channels:
        conv = DepthwiseConv2d(out_channels, size, stride, padding)
    else:
        conv = nn.Conv2d(in_channels, out_channels, size, stride, padding, groups=groups, bias=False)
    return [conv, BatchNorm2d(out_channels)]


def conv_norm_prelu(in_channels: int, out_channels: int, *shape: int) -> Layers:
    return Layers(*conv_norm(in_channels, out_channels, *shape), PReLU(out_channels))


def bottleneck(in_channels: int, out_channels: int, inner: int, stride: int) -> Layers:
    """As `Bottleneck`: widen, 3x3 depthwise, narrow, under arcface_torch's names."""
    return Layers(
        conv_norm_prelu(in_channels, inner),
        conv_norm_prelu(inner, inner, 3, stride, 1, inner),
        Layers(*conv_norm(inner, out_channels)),
        residual=stride == 1,
    )


def bottlenecks(channels: int, inner: int, count: int) -> Layers:
    return Layers(*(bottleneck(channels, channels, inner, stride=1) for _ in range(count)))


class MBF(nn.Module):
    """[B, 3, 112, 112] -> [B, D]: arcface_torch's MobileFaceNet, 2.06 M parameters at D = 512 (mbf_large: 6.31 M).

    `width` multiplies the channels between bottlenecks; those inside keep theirs. `stage_units`: bottlenecks of each
    of the four resolutions; a single one at the first is a grouped convolution of 64 groups in its place.
    """

    def __init__(self, embedding_size: int = 512, l2_norm: bool = False, stage_units=(1, 4, 6, 2), width: int = 2):
        super().__init__()
        narrow, wide = 64 * width, 128 * width
        first, second, third, fourth = stage_units
        self.layers = nn.ModuleList(
            [
                conv_norm_prelu(3, narrow, 3, 2, 1),
                conv_norm_prelu(narrow, narrow, 3, 1, 1, 64) if first == 1 else bottlenecks(narrow, 128, first),
                bottleneck(narrow, narrow, 128, stride=2),
                bottlenecks(narrow, 128, second),
                bottleneck(narrow, wide, 256, stride=2),
                bottlenecks(wide, 256, third),
                bottleneck(wide, wide, 512, stride=2),
                bottlenecks(wide, 256, fourth),
            ]
        )
        self.conv_sep = conv_norm_prelu(wide, 512)
        self.features = Layers(
            Layers(*conv_norm(512, 512, 7, 1, 0, 512)),
            nn.Flatten(),
            nn.Linear(512, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )
        self.l2_norm = l2_norm
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for layer in self.layers:
            x_BCHW = layer(x_BCHW)
        emb_BD = self.features(self.conv_sep(x_BCHW))
        return l2_normalize(emb_BD) if self.l2_norm else emb_BD
