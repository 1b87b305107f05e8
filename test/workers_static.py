"""A net that compiles in seconds, of the backbones' own pieces, and a run with it for spawned ranks."""

from __future__ import annotations

import torch
from torch import nn

import model
from learner import Learner
from model.layers import l2_normalize
from model.mobilefacenet import ConvNorm, ConvNormPReLU
from runtime.device import Device
from runtime.dist import ALONE


class SmallNet(nn.Module):
    def __init__(self, embedding_size: int):
        super().__init__()
        self.conv = ConvNormPReLU(3, 8, size=8, stride=8)
        self.conv_dw = ConvNorm(8, 8, size=3, padding=1, groups=8)
        self.linear = nn.Linear(8 * 14 * 14, embedding_size)
        self.bn = nn.BatchNorm1d(embedding_size)

    def forward(self, x_BCHW):
        x_BCHW = self.conv(x_BCHW)
        return l2_normalize(self.bn(self.linear(torch.flatten(x_BCHW + self.conv_dw(x_BCHW), 1))))


def small_model(net_mode, net_depth, embedding_size, **options):
    return SmallNet(embedding_size)


def run(config, world=ALONE):
    """Trains a SmallNet: (first weights, last weights, keys of its state dict)."""
    create_model, model.create_model = model.create_model, small_model
    try:
        learner = Learner.from_config(config, Device("cpu"), world)
        before = _weights(learner)
        learner.train()
        return before, _weights(learner), list(learner.backbone.state_dict())
    finally:
        model.create_model = create_model


def run_on_a_rank(world, config):
    return run(config, world)


def _weights(learner):
    return torch.cat([p.detach().flatten() for p in learner.backbone.parameters()]).numpy().copy()
