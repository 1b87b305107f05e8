"""The backbones by name: `create_model("ir_se", 100)` is a net [B, 3, 112, 112] -> [B, D].

`register` adds one of your own; `foreign` recognises weights by the keys of these nets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Callable

from torch import nn

from model.iresnet import STAGE_UNITS, IResNet, IRNet
from model.mobilefacenet import MBF, MobileFaceNet
from model.resnet import BASIC_PLANS, NARROW_PLANS, PLANS, ResNet
from runtime.errors import ModelError


@dataclass(frozen=True)
class Backbone:
    """One row of the table: how to build it, and what its upstream project uses where the caller leaves it open."""

    build: Callable[..., nn.Module]
    depths: tuple = ()  # empty: the net has one depth and `net_depth` is not read
    dropout: float | None = None  # None: the net has no dropout layer
    l2_norm: bool | None = None  # whether forward returns rows of length one; None: build takes no such argument
    upstream: str = ""  # whose published weights have its keys
    channel_order: str = "rgb"  # of the images that those weights were trained on


# InsightFace_Pytorch and Ascend's version decode their data with OpenCV and never swap the channels; arcface_torch and
# PLSC read RGB.
BACKBONES = {
    "ir": Backbone(IRNet, tuple(STAGE_UNITS), 0.6, True, "InsightFace_Pytorch", "bgr"),
    "ir_se": Backbone(partial(IRNet, squeeze_excite=True), tuple(STAGE_UNITS), 0.6, True, "InsightFace_Pytorch", "bgr"),
    "mobilefacenet": Backbone(MobileFaceNet, (), None, True, "InsightFace_Pytorch", "bgr"),
    "iresnet": Backbone(IResNet, tuple(STAGE_UNITS), 0.0, False, "arcface_torch"),
    "mbf": Backbone(MBF, (), None, False, "arcface_torch"),
    "mbf_large": Backbone(partial(MBF, stage_units=(2, 8, 12, 4), width=4), (), None, False, "arcface_torch"),
    "resnet": Backbone(ResNet, tuple(PLANS), 0.4, False, "PLSC"),
    "resnet_basic": Backbone(partial(ResNet, plans=BASIC_PLANS), tuple(BASIC_PLANS), 0.4, False, "PLSC"),
    "resnet_narrow": Backbone(partial(ResNet, plans=NARROW_PLANS), tuple(NARROW_PLANS), 0.4, False, "PLSC"),
}


def register(name: str, depths: tuple = (), dropout: float | None = None, l2_norm: bool | None = None):
    """Enters a backbone of your own as `--net_mode=name`; decorates its class or the function that makes it.

    The decorated is called with embedding_size=D and must give a module [B, 3, 112, 112] -> [B, D]. What else it takes
    is said here: depths (then it is called with depth=), the default dropout (dropout=), and whether it returns rows
    of length one by default (l2_norm=); heads and verification normalise by themselves.

        @model.register("tiny")
        class Tiny(nn.Module):
            def __init__(self, embedding_size): ...

    Raises ModelError for a name that is taken.
    """

    def enter(build):
        if name in BACKBONES:
            raise ModelError(f"net_mode {name!r}: there is one of this name already: choose another")
        BACKBONES[name] = Backbone(build, tuple(depths), dropout, l2_norm)
        return build

    return enter


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
        "l2_norm": backbone.l2_norm if None in (l2_norm, backbone.l2_norm) else bool(l2_norm),
    }


def name_of(architecture: Mapping) -> str:
    """The name in reports of what `describe` describes: ir_se_100, mobilefacenet."""
    depth = architecture.get("net_depth")
    return architecture["net_mode"] if depth is None else f"{architecture['net_mode']}_{depth}"


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

    `dropout` and `l2_norm` (whether rows come out with length one) default to the upstream project's own. The initial
    weights come from torch's CPU generator whatever `device` is, so that one seed gives one net everywhere. The net's
    attribute `channel_order` says which images it takes, "rgb" until somebody sets another; its state dict carries it.

    Raises ModelError for a choice that does not exist.
    """
    arguments = describe(net_mode, net_depth, embedding_size, dropout, l2_norm)
    del arguments["net_mode"]
    # a net of one depth, or without dropout, takes no such argument
    names = {"net_depth": "depth"}
    arguments = {names.get(name, name): value for name, value in arguments.items() if value is not None}
    net = BACKBONES[net_mode].build(**arguments).to(device=device, dtype=dtype)
    net.channel_order = "rgb"
    net._register_state_dict_hook(_say_channel_order)
    return net


def _say_channel_order(net, state: dict, prefix: str, notes: dict) -> None:
    # The keys of a bare state dict are an upstream project's own; what tells ours apart is among the notes that torch
    # keeps and saves with it (`_metadata`).
    notes["channel_order"] = net.channel_order
