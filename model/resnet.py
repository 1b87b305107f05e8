"""PLSC's residual nets: plain units at depth 50 and 100, bottlenecks four times as wide at 101 and 152.

They are the improved residual nets of `iresnet.py` with one PReLU slope per layer, batch norm eps 2e-5 and Xavier
(fan-out) initialisation. The layers' names are arcface_torch's; PLSC itself kept its weights in Paddle's format.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from model.iresnet import IResNetUnit, StagedNet, projection
from model.layers import BatchNorm2d, PReLU, conv

EPS = 2e-5
BOTTLENECK = 4  # the inner convolutions have a quarter of the unit's width


class BottleneckUnit(nn.Module):
    """bn - conv 1x1 - bn - prelu - conv 3x3 - bn - prelu - conv 1x1 (stride) - bn, plus the shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, eps: float, shared_slope: bool):
        super().__init__()
        inner = out_channels // BOTTLENECK
        self.bn1 = BatchNorm2d(in_channels, eps=eps)
        self.conv1 = conv(in_channels, inner, 1)
        self.bn2 = BatchNorm2d(inner, eps=eps)
        self.prelu = PReLU(1 if shared_slope else inner)
        self.conv2 = conv(inner, inner, 3)
        self.bn3 = BatchNorm2d(inner, eps=eps)
        self.prelu2 = PReLU(1 if shared_slope else inner)
        self.conv3 = conv(inner, out_channels, 1, stride)
        self.bn4 = BatchNorm2d(out_channels, eps=eps)
        self.downsample = projection(in_channels, out_channels, stride, eps)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.prelu(self.bn2(self.conv1(self.bn1(x_BCHW))))
        y_BCHW = self.prelu2(self.bn3(self.conv2(y_BCHW)))
        return self.bn4(self.conv3(y_BCHW)) + self.downsample(x_BCHW)


@dataclass(frozen=True)
class Plan:
    unit: type
    stage_units: tuple
    stage_widths: tuple


_WIDTHS = (64, 128, 256, 512)
PLANS = {  # as PLSC's documents have them; 100 is PLSC 0.2's and arcface_paddle's
    50: Plan(IResNetUnit, (3, 4, 14, 3), _WIDTHS),
    100: Plan(IResNetUnit, (3, 13, 30, 3), _WIDTHS),
    101: Plan(BottleneckUnit, (3, 4, 23, 3), (256, 512, 1024, 2048)),
    152: Plan(BottleneckUnit, (3, 8, 36, 3), (256, 512, 1024, 2048)),
}
BASIC_PLANS = {  # as PLSC's sources have the two from April 2020 on
    101: Plan(IResNetUnit, (3, 4, 23, 3), _WIDTHS),
    152: Plan(IResNetUnit, (3, 8, 36, 3), _WIDTHS),
}
NARROW_PLANS = {  # as its sources have them before: their bottlenecks are as wide as the plain units
    101: Plan(BottleneckUnit, (3, 4, 23, 3), _WIDTHS),
    152: Plan(BottleneckUnit, (3, 8, 36, 3), _WIDTHS),
}


class ResNet(StagedNet):
    """[B, 3, 112, 112] -> [B, D]: PLSC's ResNet of a depth in `plans`."""

    def __init__(
        self, depth: int, embedding_size: int = 512, dropout: float = 0.4, l2_norm: bool = False, plans: dict = PLANS
    ):
        plan = plans[depth]
        super().__init__(
            plan.unit,
            plan.stage_units,
            plan.stage_widths,
            embedding_size,
            dropout,
            l2_norm,
            eps=EPS,
            shared_slope=True,
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                # Paddle's XavierNormal(fan_in=0): a variance of 2 / fan_out
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)
