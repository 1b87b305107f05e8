"""Which parts of a network compute in half precision: operators by name (conv2d, prelu ...), or modules by theirs."""

from __future__ import annotations

import torch
from torch import nn

from runtime.errors import ConfigError

# What an operator of PLSC is here. The loss is the head's, which computes in fp32 by itself.
OPERATORS = {
    "conv2d": nn.Conv2d,
    "matmul": nn.Linear,
    "mul": nn.Linear,
    "fc": nn.Linear,
    "batch_norm": nn.modules.batchnorm._BatchNorm,
    "prelu": nn.PReLU,
    "dropout": nn.Dropout,
}
OF_THE_HEAD = {
    "exp", "square", "log", "mean", "sum", "cos_sim", "softmax", "softmax_with_cross_entropy", "cross_entropy",
    "cross_entropy2", "sigmoid_cross_entropy_with_logits",
}  # fmt: skip


class AutoMixedPrecisionLists:
    """custom_white_list: what computes in half precision (it does so already unless it is on the other list);
    custom_black_list: what computes in fp32. custom_black_varnames: fp32 too, by name.
    ValueError where both name one."""

    def __init__(self, custom_white_list=None, custom_black_list=None, custom_black_varnames=None):
        self.white_list = set(custom_white_list or ())
        self.black_list = set(custom_black_list or ())
        self.black_varnames = set(custom_black_varnames or ())
        both = self.white_list & self.black_list
        if both:
            raise ConfigError(f"amp_lists: {', '.join(sorted(both))}: on the white list and on the black one")

    def apply(self, backbone: nn.Module) -> None:
        """Makes the modules on the black list compute in fp32. ConfigError for a name that is in no list of ours and
        of no module."""
        modules = dict(backbone.named_modules())
        for name in sorted(self.white_list | self.black_list | self.black_varnames):
            kind = OPERATORS.get(name)
            chosen = [module for module in modules.values() if kind and isinstance(module, kind)]
            chosen += [module for key, module in modules.items() if key == name and not list(module.children())]
            if not chosen and name not in OPERATORS and name not in OF_THE_HEAD:
                known = ", ".join(sorted(OPERATORS))
                raise ConfigError(f"amp_lists: {name!r} is neither an operator ({known}) nor a module of the network")
            if name not in self.white_list:
                for module in chosen:
                    _compute_in_fp32(module)


def _compute_in_fp32(module: nn.Module) -> None:
    forward = module.forward

    def in_fp32(x, *rest):
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float(), *rest)

    module.forward = in_fp32
