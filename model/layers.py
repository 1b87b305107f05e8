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
        # the CPU kernel of torch 1.8 for the weight gradient of a strided one is wrong by 7 to 23 %
        if not _OLD_TORCH or self.stride == (1, 1) or x_BCHW.device.type != "cpu":
            return super().forward(x_BCHW)
        full_BCHW = F.conv2d(x_BCHW, self.weight, padding=self.padding, groups=self.groups)
        return full_BCHW[:, :, :: self.stride[0], :: self.stride[1]]


_OLD_TORCH = int(torch.__version__.split(".")[0]) < 2


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


class BatchNorm2d(nn.BatchNorm2d):
    """torch's batch norm; in training in float32 on a CPU in channels_last, with sums that are right there too.

    torch's kernel for that layout adds up a channel's pixels in float32 one after another: wrong by 1e-5 at a million
    pixels, where the other layout's is wrong by 1e-7.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self._sums_in_pieces(x_BCHW):
            return super().forward(x_BCHW)
        self.num_batches_tracked.add_(1)
        state = (self.running_mean, self.running_var, self.momentum, self.eps)
        return _BatchNormInPieces.apply(x_BCHW, self.weight, self.bias, *state)

    def _sums_in_pieces(self, x_BCHW):
        return (
            self.training
            and not _OLD_TORCH  # whose kernels do not take such views
            and x_BCHW.device.type == "cpu"
            and x_BCHW.dtype == torch.float32
            and x_BCHW.is_contiguous(memory_format=torch.channels_last)
            and not x_BCHW.is_contiguous()
            and self.momentum is not None
            and self.track_running_stats
            and self.affine
            and not _being_traced()
        )


class _BatchNormInPieces(torch.autograd.Function):
    """Batch norm (arXiv 1502.03167) of float32 [B, C, H, W] in channels_last, from torch's own kernels.

    They see the W pixels of a row as W times C channels, so that each of their sums has W times fewer terms; the W
    parts of a channel are joined in float64. The other passes are elementwise.
    """

    @staticmethod
    def forward(ctx, x_BCHW, weight_C, bias_C, running_mean_C, running_var_C, momentum, eps):
        width, count = x_BCHW.shape[3], x_BCHW.numel() // x_BCHW.shape[1]
        mean_W, var_W = (
            part.view(width, -1).double()
            for part in torch.ops.aten.batch_norm_update_stats(_pixels_as_channels(x_BCHW), None, None, 0.0)
        )
        mean_C = mean_W.mean(0)
        var_C = (var_W + (mean_W - mean_C).square()).mean(0)
        running_mean_C.mul_(1 - momentum).add_(mean_C, alpha=momentum)
        running_var_C.mul_(1 - momentum).add_(var_C, alpha=momentum * count / (count - 1))
        ctx.save_for_backward(x_BCHW, weight_C, mean_C, var_C)
        ctx.eps = eps
        return torch.native_batch_norm(x_BCHW, weight_C, bias_C, mean_C.float(), var_C.float(), False, 0.0, eps)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BCHW):
        x_BCHW, weight_C, mean_C, var_C = ctx.saved_tensors
        channels, width = x_BCHW.shape[1], x_BCHW.shape[3]
        grad_BCHW = grad_BCHW.contiguous(memory_format=torch.channels_last)
        # Σ grad (x - mean) and Σ grad: the gradients of scale and shift where the deviation is 1
        one_C = torch.ones(channels * width)
        _, along_C, total_C = torch.ops.aten.native_batch_norm_backward(
            _pixels_as_channels(grad_BCHW),
            _pixels_as_channels(x_BCHW),
            *(one_C, None, None, mean_C.float().repeat(width), one_C),
            *(True, 0.0, [False, True, True]),
        )
        along_C, total_C = (part.view(width, -1).sum(0, dtype=torch.float64) for part in (along_C, total_C))
        inverse_C = (var_C + ctx.eps).rsqrt()
        scale_C = weight_C * inverse_C
        # scale (grad - Σ grad / n - (x - mean) Σ grad (x - mean) / (n var))
        share_C = -scale_C * channels / x_BCHW.numel()
        grad_x_BCHW = torch.native_batch_norm(
            x_BCHW,
            (share_C * inverse_C.square() * along_C).float(),
            (share_C * total_C).float(),
            *(mean_C.float(), one_C[:channels], False, 0.0, 0.0),
        )[0]
        grad_x_BCHW.addcmul_(grad_BCHW, scale_C.float().view(-1, 1, 1))
        return grad_x_BCHW, (along_C * inverse_C).float(), total_C.float(), None, None, None, None


def _pixels_as_channels(x_BCHW):
    """channels_last [B, C, H, W] as channels_last [B, W C, H, 1]."""
    batch, channels, height, width = x_BCHW.shape
    rows = x_BCHW.permute(0, 2, 3, 1).reshape(batch, height, 1, width * channels)
    return rows.permute(0, 3, 1, 2)


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
