"""Which parts of a network compute in half precision: operators by name (conv2d, prelu ...), or modules by theirs."""

from __future__ import annotations

from contextlib import nullcontext

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
    """custom_white_list: what computes in half precision, by the names of operators or of the network's modules;
    custom_black_list: what computes in fp32. custom_black_varnames: fp32 too, by name.
    ValueError where both name one, and where one asks for the loss in half precision."""

    def __init__(self, custom_white_list=None, custom_black_list=None, custom_black_varnames=None):
        self.white_list = set(custom_white_list or ())
        self.black_list = set(custom_black_list or ())
        self.black_varnames = set(custom_black_varnames or ())
        both = self.white_list & (self.black_list | self.black_varnames)
        if both:
            raise ConfigError(f"amp_lists: {', '.join(sorted(both))}: on the white list and on the black one")
        of_the_head = self.white_list & OF_THE_HEAD
        if of_the_head:
            raise ConfigError(
                f"amp_lists: {', '.join(sorted(of_the_head))}: the loss computes in fp32 here: leave them out of "
                "custom_white_list"
            )

    def apply(self, backbone: nn.Module, half: torch.dtype) -> None:
        """Under autocast, makes the modules on the black list compute in fp32, and those on the white one in `half`.
        A module's own name goes before an operator's. ConfigError for a name that is in no list of ours and of no
        module."""
        modules = dict(backbone.named_modules())
        own, of_a_kind = {}, {}
        for name in sorted(self.white_list | self.black_list | self.black_varnames):
            dtype = half if name in self.white_list else torch.float32
            kind = OPERATORS.get(name)
            if name in modules and not list(modules[name].children()):
                own[name] = dtype
            elif kind is not None:
                of_a_kind.update({key: dtype for key, module in modules.items() if isinstance(module, kind)})
            elif name not in OF_THE_HEAD:
                known = ", ".join(sorted(OPERATORS))
                raise ConfigError(f"amp_lists: {name!r} is neither an operator ({known}) nor a module of the network")
        for name, dtype in {**of_a_kind, **own}.items():
            _compute_in(modules[name], dtype)


def _compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Under autocast alone: a network that is exported or verified after the training computes as it was saved."""
    forward = module.forward

    def in_dtype(x, *rest):
        if not _is_autocast(x.device.type):
            return forward(x, *rest)
        # half images make autocast take half parameters; batch norm's statistics stay fp32 beside them
        with torch.autocast(x.device.type, enabled=False) if dtype == torch.float32 else nullcontext():
            return forward(x.to(dtype), *rest)

    module.forward = in_dtype


def _is_autocast(kind: str) -> bool:
    try:
        return torch.is_autocast_enabled(kind)
    except TypeError:  # torch before 2.4
        return torch.is_autocast_cpu_enabled() if kind == "cpu" else torch.is_autocast_enabled()
