"""The backbones by name: `create_model("ir_se", 100)` is a net [B, 3, 112, 112] -> [B, D].

The head (margins, class centers) lives beside them in this package and is imported by its own module's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Callable

from torch import nn

from model.iresnet import STAGE_UNITS, IResNet, IRNet
from model.mobilefacenet import MobileFaceNet
from model.resnet import PLANS, ResNet
from runtime.errors import ModelError


@dataclass(frozen=True)
class Backbone:
    """One row of the table: how to build it, and what its own lineage uses where the caller leaves a choice open."""

    build: Callable[..., nn.Module]
    depths: tuple  # empty: the net has one depth and `net_depth` is not read
    dropout: float | None  # None: the net has no dropout layer
    l2_norm: bool  # whether the lineage's forward returns rows of length one


BACKBONES = {
    "ir": Backbone(IRNet, tuple(STAGE_UNITS), dropout=0.6, l2_norm=True),
    "ir_se": Backbone(partial(IRNet, squeeze_excite=True), tuple(STAGE_UNITS), dropout=0.6, l2_norm=True),
    "mobilefacenet": Backbone(MobileFaceNet, (), dropout=None, l2_norm=True),
    "iresnet": Backbone(IResNet, tuple(STAGE_UNITS), dropout=0.0, l2_norm=False),
    "resnet": Backbone(ResNet, tuple(PLANS), dropout=0.4, l2_norm=False),
}


def describe(
    net_mode: str,
    net_depth: int | None = 100,
    embedding_size: int = 512,
    dropout: float | None = None,
    l2_norm: bool | None = None,
) -> dict:
    """What `create_model` would build, as plain values with every default filled in.

    It is what a checkpoint records: `create_model(**describe(...))` builds the same net again.

    Raises ModelError for a choice that does not exist.
    """
    if net_mode not in BACKBONES:
        raise ModelError(f"net_mode {net_mode!r}: choose from {', '.join(BACKBONES)}")
    backbone = BACKBONES[net_mode]
    if not backbone.depths:
        net_depth = None
    elif net_depth not in backbone.depths:
        raise ModelError(f"net_depth {net_depth!r}: {net_mode} has {', '.join(map(str, backbone.depths))}")
    if not isinstance(embedding_size, int) or embedding_size < 1:
        raise ModelError(f"embedding_size {embedding_size!r}: give a whole number of at least 1 (512 is usual)")
    if dropout is None:
        dropout = backbone.dropout
    elif backbone.dropout is None:
        if dropout != 0:
            raise ModelError(f"dropout {dropout}: {net_mode} has no dropout layer; leave it out or give 0")
        dropout = None
    elif not 0 <= dropout < 1:
        raise ModelError(f"dropout {dropout}: give a probability from 0 up to, but not including, 1")
    return {
        "net_mode": net_mode,
        "net_depth": net_depth,
        "embedding_size": embedding_size,
        "dropout": dropout,
        "l2_norm": backbone.l2_norm if l2_norm is None else bool(l2_norm),
    }


def create_model(
    net_mode: str,
    net_depth: int | None = 100,
    embedding_size: int = 512,
    dropout: float | None = None,
    l2_norm: bool | None = None,
    device=None,
    dtype=None,
) -> nn.Module:
    """A freshly initialised backbone, [B, 3, 112, 112] -> [B, embedding_size], in training mode.

    `dropout` and `l2_norm` (whether rows come out with length one) default to the lineage's own. The initial weights
    come from torch's CPU generator whatever `device` is, so that one seed gives one net everywhere.

    Raises ModelError for a choice that does not exist.
    """
    arguments = describe(net_mode, net_depth, embedding_size, dropout, l2_norm)
    del arguments["net_mode"]
    # a net of one depth, or without dropout, takes no such argument
    names = {"net_depth": "depth"}
    arguments = {names.get(name, name): value for name, value in arguments.items() if value is not None}
    return BACKBONES[net_mode].build(**arguments).to(device=device, dtype=dtype)
