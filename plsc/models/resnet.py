"""PLSC's own networks as models of the user's kind, for those who derive from them: ResNet(layers, emb_dim)."""

from __future__ import annotations

import model
from plsc.models.base_model import BaseModel


class ResNet(BaseModel):
    """The net `resnet_<layers>` of this project: 50, 100, 101 or 152; the latter two as PLSC's document has them."""

    def __init__(self, layers: int = 50, emb_dim: int = 512):
        super().__init__()
        self.layers, self.emb_dim = layers, emb_dim
        self.net = model.create_model("resnet", layers, emb_dim)

    def build_network(self, input, label, is_train=True):
        return self.net(input)


def ResNet50(emb_dim: int = 512) -> ResNet:
    return ResNet(50, emb_dim)


def ResNet101(emb_dim: int = 512) -> ResNet:
    return ResNet(101, emb_dim)


def ResNet152(emb_dim: int = 512) -> ResNet:
    return ResNet(152, emb_dim)
