"""The backbones once more, as plain functions of a state dict's keys: what the modules are held against.

Nothing here is shared with the package under test. Everything works in the dtype of the state dict.
"""

from __future__ import annotations

import re

import torch
from torch.nn import functional as F


def plain_forward(net_mode: str, state: dict, x_BCHW, training: bool = False):
    """The embedding before any normalisation; training=True takes the batch's own statistics (no dropout)."""
    forward = {
        "ir": _ir,
        "ir_se": _ir,
        "iresnet": _staged,
        "resnet": _staged,
        "mobilefacenet": _mobilefacenet,
        "mbf": _mbf,
        "mbf_large": _mbf,
    }[net_mode]
    return forward(_Ops(state, training, eps=2e-5 if net_mode == "resnet" else 1e-5), x_BCHW)


class _Ops:
    def __init__(self, state, training, eps):
        self.state, self.training, self.eps = state, training, eps

    def has(self, prefix):
        return any(key.startswith(prefix) for key in self.state)

    def count(self, pattern):
        return 1 + max(int(match[1]) for match in (re.match(pattern, key) for key in self.state) if match)

    def conv(self, name, x, stride=1, padding=None):
        weight = self.state[name + ".weight"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, None, stride, padding, groups=x.shape[1] // weight.shape[1])

    def norm(self, name, x):
        weight, bias = self.state[name + ".weight"], self.state[name + ".bias"]
        if self.training:
            others = [dim for dim in range(x.dim()) if dim != 1]
            mean, var = x.mean(others), x.var(others, unbiased=False)
        else:
            mean, var = self.state[name + ".running_mean"], self.state[name + ".running_var"]
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scale = weight / torch.sqrt(var + self.eps)
        return (x - mean.view(shape)) * scale.view(shape) + bias.view(shape)

    def prelu(self, name, x):
        slope = self.state[name + ".weight"].view(-1, 1, 1)
        return torch.where(x > 0, x, slope * x)

    def linear(self, name, x):
        y = x @ self.state[name + ".weight"].t()
        return y + self.state[name + ".bias"] if name + ".bias" in self.state else y


def _ir(ops, x):
    x = ops.prelu("input_layer.2", ops.norm("input_layer.1", ops.conv("input_layer.0", x)))
    width = 0  # the first unit halves the resolution as every change of width does
    for index in range(ops.count(r"body\.(\d+)\.")):
        res, shortcut = f"body.{index}.res_layer", f"body.{index}.shortcut_layer"
        out_width = ops.state[f"{res}.3.weight"].shape[0]
        stride = 1 if out_width == width else 2
        width = out_width
        y = ops.prelu(f"{res}.2", ops.conv(f"{res}.1", ops.norm(f"{res}.0", x)))
        y = ops.norm(f"{res}.4", ops.conv(f"{res}.3", y, stride))
        if ops.has(f"{res}.5."):
            gate = torch.relu(ops.conv(f"{res}.5.fc1", y.mean((2, 3), keepdim=True)))
            y = y * torch.sigmoid(ops.conv(f"{res}.5.fc2", gate))
        if ops.has(f"{shortcut}."):
            x = y + ops.norm(f"{shortcut}.1", ops.conv(f"{shortcut}.0", x, stride))
        else:
            x = y + F.max_pool2d(x, 1, stride)
    x = ops.linear("output_layer.3", ops.norm("output_layer.0", x).flatten(1))
    return ops.norm("output_layer.4", x)


def _staged(ops, x):
    x = ops.prelu("prelu", ops.norm("bn1", ops.conv("conv1", x)))
    for stage in range(1, 5):
        for index in range(ops.count(rf"layer{stage}\.(\d+)\.")):
            unit, stride = f"layer{stage}.{index}", 2 if index == 0 else 1
            y = ops.conv(f"{unit}.conv1", ops.norm(f"{unit}.bn1", x))
            y = ops.prelu(f"{unit}.prelu", ops.norm(f"{unit}.bn2", y))
            if ops.has(f"{unit}.conv3."):
                y = ops.norm(f"{unit}.bn3", ops.conv(f"{unit}.conv2", y))
                y = ops.norm(f"{unit}.bn4", ops.conv(f"{unit}.conv3", ops.prelu(f"{unit}.prelu2", y), stride))
            else:
                y = ops.norm(f"{unit}.bn3", ops.conv(f"{unit}.conv2", y, stride))
            if stride == 2:
                x = ops.norm(f"{unit}.downsample.1", ops.conv(f"{unit}.downsample.0", x, stride))
            x = y + x
    return ops.norm("features", ops.linear("fc", ops.norm("bn2", x).flatten(1)))


def _mobilefacenet(ops, x):
    def block(name, x, stride=1, padding=None, prelu=True):
        x = ops.norm(f"{name}.bn", ops.conv(f"{name}.conv", x, stride, padding))
        return ops.prelu(f"{name}.prelu", x) if prelu else x

    def bottleneck(name, x, stride):
        y = block(f"{name}.conv_dw", block(f"{name}.conv", x), stride)
        y = block(f"{name}.project", y, prelu=False)
        return x + y if stride == 1 else y

    x = block("conv2_dw", block("conv1", x, stride=2))
    for narrow, stack, count in (("conv_23", "conv_3", 4), ("conv_34", "conv_4", 6), ("conv_45", "conv_5", 2)):
        x = bottleneck(narrow, x, stride=2)
        for index in range(count):
            x = bottleneck(f"{stack}.model.{index}", x, stride=1)
    x = block("conv_6_dw", block("conv_6_sep", x), padding=0, prelu=False)
    return ops.norm("bn", ops.linear("linear", x.flatten(1)))


def _mbf(ops, x):
    def block(name, x, stride=1, padding=None, prelu=True):
        x = ops.norm(f"{name}.layers.1", ops.conv(f"{name}.layers.0", x, stride, padding))
        return ops.prelu(f"{name}.layers.2", x) if prelu else x

    def bottleneck(name, x, stride):
        y = block(f"{name}.layers.1", block(f"{name}.layers.0", x), stride)
        y = block(f"{name}.layers.2", y, prelu=False)
        return x + y if stride == 1 else y

    x = block("layers.0", x, stride=2)
    if ops.has("layers.1.layers.0.layers."):
        for unit in range(ops.count(r"layers\.1\.layers\.(\d+)\.")):
            x = bottleneck(f"layers.1.layers.{unit}", x, stride=1)
    else:
        x = block("layers.1", x)
    for index in (2, 4, 6):
        x = bottleneck(f"layers.{index}", x, stride=2)
        for unit in range(ops.count(rf"layers\.{index + 1}\.layers\.(\d+)\.")):
            x = bottleneck(f"layers.{index + 1}.layers.{unit}", x, stride=1)
    x = block("features.layers.0", block("conv_sep", x), padding=0, prelu=False)
    return ops.norm("features.layers.3", ops.linear("features.layers.2", x.flatten(1)))


def randomise_(net, seed: int = 0):
    """Weights, statistics and slopes away from the values at which a mistake would not show; activations stay near 1.

    A fresh batch norm does nothing in eval mode, and the same slope in every channel hides a mixed-up channel.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform_(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                uniform_(module.weight, 0.5, 1.0)
                uniform_(module.bias, -0.2, 0.2)
                uniform_(module.running_mean, -0.2, 0.2)
                uniform_(module.running_var, 0.5, 1.5)
            elif isinstance(module, torch.nn.PReLU):
                uniform_(module.weight, 0.0, 0.5)
            elif isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                bound = (3 / module.weight[0].numel()) ** 0.5  # keeps the variance
                uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    uniform_(module.bias, -0.2, 0.2)
    return net
