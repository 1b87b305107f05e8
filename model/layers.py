"""The pieces that the backbones share. B images, C channels, H height, W width, D embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SE_REDUCTION = 16


def l2_normalize(emb_BD: Tensor) -> Tensor:
    """Rows of length one; a half-precision input gives a float32 output, whose rows have length one to float32."""
    if emb_BD.dtype in (torch.float16, torch.bfloat16):
        emb_BD = emb_BD.float()
    return F.normalize(emb_BD)


def conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A square convolution without bias (a batch norm follows or precedes each), padded to keep the resolution."""
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


class DepthwiseConv2d(nn.Conv2d):
    """torch's convolution of each channel by itself, with weight gradients that are right in old torch too."""

    def __init__(self, channels: int, size: int, stride: int = 1, padding: int = 0):
        super().__init__(channels, channels, size, stride, padding, groups=channels, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not _WRONG_IF_STRIDED or self.stride == (1, 1) or x_BCHW.device.type != "cpu":
            return super().forward(x_BCHW)
        full_BCHW = F.conv2d(x_BCHW, self.weight, padding=self.padding, groups=self.groups)
        return full_BCHW[:, :, :: self.stride[0], :: self.stride[1]]


# The CPU kernel of torch 1.8 for the weight gradient of a strided depthwise convolution is wrong by 7 to 23 %.
_WRONG_IF_STRIDED = int(torch.__version__.split(".")[0]) < 2


class Subsample(nn.Module):
    """Every stride-th pixel: the value of a 1x1 max-pool, without its search and its index map."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW[:, :, :: self.stride, :: self.stride]

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means of all channels (arXiv 1709.01507)."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = conv(channels, channels // SE_REDUCTION, 1)
        self.fc2 = conv(channels // SE_REDUCTION, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        mean_BC11 = F.adaptive_avg_pool2d(x_BCHW, 1)
        return x_BCHW * torch.sigmoid(self.fc2(F.relu(self.fc1(mean_BC11))))


class PReLU(nn.PReLU):
    """torch's PReLU, in training on the CPU with a backward pass that runs there 3 to 5 times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.training and not _being_traced():
            return _PReLUFromVectorOps.apply(x, self.weight)
        return F.prelu(x, self.weight)


class _PReLUFromVectorOps(torch.autograd.Function):
    """The gradients of F.prelu to the bit, from elementwise kernels that torch vectorises; its own it does not.

    (Where an output gradient is infinite these can be NaN; a loss scaler sees an overflow in either.)
    """

    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x, slope)
        return F.prelu(x, slope)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, slope = ctx.saved_tensors
        # one slope per channel, or one for all; in the activations' dtype, which under autocast is not the slope's
        slope_C11 = slope.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
        where_positive = torch.ops.aten.threshold_backward(grad, x, 0)
        elsewhere = grad - where_positive
        grad_x = where_positive.addcmul_(elsewhere, slope_C11)
        grad_slope = elsewhere.mul_(x).sum_to_size(slope_C11.shape)
        return grad_x, grad_slope.view_as(slope).to(slope.dtype)


_is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)


def _being_traced() -> bool:
    # compilers and exporters know prelu by name, and fuse it better than any formula of ours
    return _is_compiling() or torch._C._get_tracing_state() is not None
