"""A network of the user's own: a subclass with `build_network(input, label, is_train)`, in torch."""

from __future__ import annotations

import torch
from torch import nn

from plsc import fluid
from runtime.errors import ModelError


class BaseModel(nn.Module):
    """build_network takes images [B, 3, H, W] and gives embeddings [B, D], not normalised.

    Modules may be made in __init__ as in any torch module, or by `plsc.fluid.layers` inside build_network. label is
    int64 [B, 1] in training and None elsewhere; is_train says which.
    """

    def __init__(self):
        super().__init__()
        self.made = nn.ModuleList()  # by fluid.layers, in the order of the calls
        self.label_B = None
        self._is_built = False

    def build_network(self, input, label, is_train=True):
        raise NotImplementedError

    def forward(self, images_BCHW):
        label = None
        if self.training and self.label_B is not None and len(self.label_B) == len(images_BCHW):
            label = self.label_B[:, None]
        with fluid.Calls(self.made, self._is_built):
            return self.build_network(images_BCHW, label, self.training)

    def build(self, emb_dim: int, image_shape=(3, 112, 112)) -> BaseModel:
        """Makes all layers by one pass over a blank batch. Raises ModelError for a class without build_network, and
        where what comes out is not [B, emb_dim]."""
        name = type(self).__name__
        if type(self).build_network is BaseModel.build_network:
            raise ModelError(f"{name} has no build_network: a subclass of BaseModel has to define it")
        if not self._is_built:
            self.label_B = torch.zeros(2, dtype=torch.int64)
            try:
                with torch.no_grad():
                    emb_BD = self.train()(torch.zeros(2, *image_shape))
            except TypeError as error:
                raise ModelError(f"{name}.build_network(input, label, is_train): {error}") from error
            self.label_B, self._is_built = None, True
            for module in self.made:
                if hasattr(module, "reset_running_stats"):
                    module.reset_running_stats()  # the blank batch is no data
            self.emb_shape = tuple(emb_BD.shape) if isinstance(emb_BD, torch.Tensor) else None
        if self.emb_shape != (2, emb_dim):
            raise ModelError(
                f"{name}.build_network gives {list(self.emb_shape or ['no tensor'])} for 2 images, and [2, {emb_dim}] "
                "is needed: set_emb_size gives the width of an embedding"
            )
        return self

    # --- the helpers that PLSC's example of a network calls ------------------------------------------------------

    def conv_bn_layer(self, input, num_filters, filter_size, stride=1, pad=0, groups=1, is_train=True, act=None):
        """Convolution and batch norm; with act="prelu" a PReLU of one value for the whole layer."""
        layers, xavier = fluid.layers, fluid.initializer.Xavier(uniform=False, fan_in=0.0)
        conv = layers.conv2d(
            input, num_filters, filter_size, stride, pad, groups=groups,
            param_attr=fluid.ParamAttr(initializer=xavier), bias_attr=False,
        )  # fmt: skip
        if act != "prelu":
            return layers.batch_norm(conv, act=act, epsilon=2e-05, is_test=not is_train)
        return layers.prelu(layers.batch_norm(conv, epsilon=2e-05, is_test=not is_train), mode="all")

    def shortcut(self, input, ch_out, stride, is_train):
        """The input itself, or where its shape changes a 1x1 convolution of it."""
        if input.shape[1] == ch_out and stride == 1:
            return input
        return self.conv_bn_layer(input, ch_out, 1, stride, is_train=is_train)

    def bottleneck_block(self, input, num_filters, stride, is_train):
        """A unit of two 3x3 convolutions; from `self.layers` 101 on a bottleneck of a quarter of the width."""
        norm = fluid.layers.batch_norm(input, epsilon=2e-05, is_test=not is_train)
        if getattr(self, "layers", 50) < 101:
            inner = self.conv_bn_layer(norm, num_filters, 3, pad=1, act="prelu", is_train=is_train)
            outer = self.conv_bn_layer(inner, num_filters, 3, stride, pad=1, is_train=is_train)
        else:
            narrow = self.conv_bn_layer(norm, num_filters // 4, 1, act="prelu", is_train=is_train)
            inner = self.conv_bn_layer(narrow, num_filters // 4, 3, pad=1, act="prelu", is_train=is_train)
            outer = self.conv_bn_layer(inner, num_filters, 1, stride, is_train=is_train)
        return fluid.layers.elementwise_add(x=self.shortcut(input, num_filters, stride, is_train), y=outer)
