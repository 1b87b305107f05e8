"""The framework's words in which PLSC's users write networks: `import plsc.fluid as fluid` for `import paddle.fluid`.

`fluid.layers.conv2d(input, ...)` inside a `build_network` makes a torch module when the network is built, and uses it
again, in the order of the calls, in every later pass. Only what networks are made of is here.
"""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from model.layers import PReLU
from runtime.errors import ModelError

_building = threading.local()


class Calls:
    """The modules of a network in the order in which build_network asks for them. A context: one pass of it."""

    def __init__(self, modules: nn.ModuleList, frozen: bool):
        self.modules, self.frozen, self.at = modules, frozen, 0

    def __enter__(self) -> Calls:
        self._outer = getattr(_building, "calls", None)
        _building.calls = self
        return self

    def __exit__(self, *_error) -> None:
        _building.calls = self._outer

    def next(self, make) -> nn.Module:
        if self.at == len(self.modules):
            if self.frozen:
                raise ModelError(
                    "build_network asks for more layers than when it was built: it must not depend on data"
                )
            self.modules.append(make())
        self.at += 1
        return self.modules[self.at - 1]


def _layer(make) -> nn.Module:
    calls = getattr(_building, "calls", None)
    if calls is None:
        raise ModelError("fluid.layers are for a model's build_network; outside of it use torch's own")
    return calls.next(make)


# --- what a parameter is ----------------------------------------------------------------------------------------------


class ParamAttr:
    """initializer: one of `fluid.initializer`, a number, an array, or a function of a tensor. learning_rate: over the
    run's. regularizer: L2Decay. trainable: False leaves it as it begins."""

    def __init__(
        self,
        name=None,
        initializer=None,
        learning_rate: float = 1.0,
        regularizer=None,
        trainable: bool = True,
        gradient_clip=None,
        do_model_average: bool = False,
    ):
        self.name, self.initializer, self.learning_rate = name, initializer, learning_rate
        self.regularizer, self.trainable = regularizer, trainable
        if gradient_clip is not None or do_model_average:
            raise ModelError("ParamAttr: gradient_clip and do_model_average are not here: leave them out")

    @property
    def rate(self) -> float:
        return float(self.learning_rate) if self.trainable else 0.0

    def decay(self, otherwise: float) -> float:
        return otherwise if self.regularizer is None else float(self.regularizer.coefficient)


@torch.no_grad()
def initialize(tensor: torch.Tensor, how, default=None) -> None:
    """Fills `tensor` by an initializer of a ParamAttr; by `default`, a function of it, where there is none."""
    how = how.initializer if isinstance(how, ParamAttr) else how
    if how is None or isinstance(how, bool):
        if default is not None:
            default(tensor)
    elif callable(how):
        how(tensor)
    else:
        value = torch.as_tensor(how, dtype=tensor.dtype)
        try:
            tensor.copy_(value.expand_as(tensor))
        except RuntimeError:
            raise ModelError(
                f"an initial value of shape {list(value.shape)} is none for a parameter of shape {list(tensor.shape)}"
            ) from None


def _fans(tensor: torch.Tensor) -> tuple[int, int]:
    """(in, out), by the shapes of torch: [out, in, ...]."""
    area = tensor[0, 0].numel() if tensor.dim() > 2 else 1
    return tensor.shape[1] * area, tensor.shape[0] * area


class Constant:
    def __init__(self, value: float = 0.0, force_cpu: bool = False):
        self.value = value

    def __call__(self, tensor):
        tensor.fill_(self.value)


class Normal:
    def __init__(self, loc: float = 0.0, scale: float = 1.0, seed: int = 0):
        self.loc, self.scale = loc, scale

    def __call__(self, tensor):
        tensor.normal_(self.loc, self.scale)


class Uniform:
    def __init__(self, low: float = -1.0, high: float = 1.0, seed: int = 0):
        self.low, self.high = low, high

    def __call__(self, tensor):
        tensor.uniform_(self.low, self.high)


class Xavier:
    """Variance 2 / (fan_in + fan_out); a fan that is given, 0 too, counts instead of the tensor's."""

    def __init__(self, uniform: bool = True, fan_in=None, fan_out=None, seed: int = 0):
        self.uniform, self.fan_in, self.fan_out = uniform, fan_in, fan_out

    def __call__(self, tensor):
        fan_in, fan_out = _fans(tensor)
        fans = (fan_in if self.fan_in is None else self.fan_in) + (fan_out if self.fan_out is None else self.fan_out)
        std = math.sqrt(2.0 / fans)
        tensor.uniform_(-std * math.sqrt(3), std * math.sqrt(3)) if self.uniform else tensor.normal_(0, std)


class MSRA:
    """Variance 2 / fan_in."""

    def __init__(self, uniform: bool = True, fan_in=None, seed: int = 0):
        self.uniform, self.fan_in = uniform, fan_in

    def __call__(self, tensor):
        std = math.sqrt(2.0 / (_fans(tensor)[0] if self.fan_in is None else self.fan_in))
        tensor.uniform_(-std * math.sqrt(3), std * math.sqrt(3)) if self.uniform else tensor.normal_(0, std)


class L2Decay:
    def __init__(self, regularization_coeff: float = 0.0):
        self.coefficient = regularization_coeff


initializer = SimpleNamespace(
    Constant=Constant,
    ConstantInitializer=Constant,
    Normal=Normal,
    NormalInitializer=Normal,
    Uniform=Uniform,
    UniformInitializer=Uniform,
    Xavier=Xavier,
    XavierInitializer=Xavier,
    MSRA=MSRA,
    MSRAInitializer=MSRA,
    NumpyArrayInitializer=lambda value: value,
)
param_attr = SimpleNamespace(ParamAttr=ParamAttr)
regularizer = SimpleNamespace(L2Decay=L2Decay, L2DecayRegularizer=L2Decay)


# --- layers -----------------------------------------------------------------------------------------------------------


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """For images and for rows alike."""

    def _check_input_dim(self, input):
        pass


def _activated(x, act):
    if act is None:
        return x
    functions = {"relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "softmax": lambda x: F.softmax(x, -1)}
    if act not in functions:
        raise ModelError(f"act {act!r}: choose from {', '.join(functions)}, or call fluid.layers.prelu")
    return functions[act](x)


def _conv2d(
    input,
    num_filters,
    filter_size,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    param_attr=None,
    bias_attr=None,
    use_cudnn=True,
    act=None,
    name=None,
    data_format="NCHW",
):
    groups = groups or 1

    def make():
        conv = nn.Conv2d(
            input.shape[1],
            int(num_filters),
            filter_size,
            stride,
            padding,
            dilation,
            groups,
            bias=bias_attr is not False,
        )
        fan_in = conv.weight[0].numel()
        initialize(conv.weight, param_attr, lambda w: w.normal_(0, math.sqrt(2.0 / fan_in)))
        if conv.bias is not None:
            initialize(conv.bias, bias_attr, torch.Tensor.zero_)
        return conv

    return _activated(_layer(make)(input), act)


def _batch_norm(
    input, act=None, is_test=False, momentum=0.9, epsilon=1e-5, param_attr=None, bias_attr=None, name=None, **_other
):
    def make():
        norm = _BatchNorm(input.shape[1], eps=epsilon, momentum=1 - momentum)
        initialize(norm.weight, param_attr)
        initialize(norm.bias, bias_attr)
        return norm

    norm = _layer(make)
    if is_test and norm.training:
        output = F.batch_norm(input, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    else:
        output = norm(input)
    return _activated(output, act)


def _fc(input, size, num_flatten_dims=1, param_attr=None, bias_attr=None, act=None, is_test=False, name=None):
    rows = torch.flatten(input, num_flatten_dims)

    def make():
        linear = nn.Linear(rows.shape[-1], size, bias=bias_attr is not False)
        initialize(linear.weight, param_attr, Xavier())
        if linear.bias is not None:
            initialize(linear.bias, bias_attr, torch.Tensor.zero_)
        return linear

    return _activated(_layer(make)(rows), act)


def _dropout(x, dropout_prob, is_test=False, seed=None, name=None, dropout_implementation="downgrade_in_infer"):
    dropout = _layer(lambda: nn.Dropout(dropout_prob))
    if dropout_implementation == "upscale_in_train":
        return x if is_test else dropout(x)
    # Paddle's default: what remains stays as it is in training, and everything is scaled down afterwards
    return dropout(x) * (1 - dropout_prob) if dropout.training and not is_test else x * (1 - dropout_prob)


def _prelu(x, mode, param_attr=None, name=None):
    if mode not in ("all", "channel"):
        raise ModelError(f"prelu mode {mode!r}: choose from all, channel")

    def make():
        prelu = PReLU(1 if mode == "all" else x.shape[1])
        initialize(prelu.weight, param_attr, lambda w: w.fill_(0.25))
        return prelu

    return _layer(make)(x)


def _pool2d(
    input, pool_size=-1, pool_type="max", pool_stride=1, pool_padding=0, global_pooling=False, ceil_mode=False,
    exclusive=True, **_other,
):  # fmt: skip
    if global_pooling:
        return F.adaptive_max_pool2d(input, 1) if pool_type == "max" else F.adaptive_avg_pool2d(input, 1)
    if pool_type == "max":
        return F.max_pool2d(input, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    return F.avg_pool2d(input, pool_size, pool_stride, pool_padding, ceil_mode, not exclusive)


layers = SimpleNamespace(
    conv2d=_conv2d,
    batch_norm=_batch_norm,
    fc=_fc,
    dropout=_dropout,
    prelu=_prelu,
    pool2d=_pool2d,
    relu=lambda x, name=None: F.relu(x),
    sigmoid=lambda x, name=None: torch.sigmoid(x),
    elementwise_add=lambda x, y, axis=-1, act=None, name=None: _activated(x + y, act),
    elementwise_mul=lambda x, y, axis=-1, act=None, name=None: _activated(x * y, act),
    concat=lambda input, axis=0, name=None: torch.cat(input, axis),
    reshape=lambda x, shape, **_other: x.reshape(tuple(shape)),
    flatten=lambda x, axis=1, name=None: torch.flatten(x, axis),
)
