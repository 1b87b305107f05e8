"""Face nets' weights of other projects, recognised by the keys and shapes of their state dicts alone.

Three lineages are known, and this project's own files are among them because its nets keep the lineages' keys:
InsightFace_Pytorch and Ascend's LResNet100E-IR (`ir`, `ir_se`, `mobilefacenet`), arcface_torch (`iresnet`), and this
project's form of PLSC's nets (`resnet`). The layouts below are written down as file formats, key by key, so that a
file is judged before any net is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from checkpoint.store import load_pth
from runtime.errors import CheckpointError

DEPTHS = {
    (2, 2, 2, 2): 18,
    (3, 4, 6, 3): 34,
    (3, 4, 14, 3): 50,
    (3, 13, 30, 3): 100,
    (3, 8, 36, 3): 152,
    (6, 26, 60, 6): 200,
}
RESNET_DEPTHS = {(3, 4, 14, 3): 50}
RESNET_BOTTLENECK_DEPTHS = {(3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
WIDTHS = (64, 128, 256, 512)
CHANNEL_ORDERS = ("rgb", "bgr")
HALF = (torch.float16, torch.bfloat16)
# what DistributedDataParallel and torch.compile put before every key
WRAPPERS = ("module.", "_orig_mod.")
# where a training checkpoint keeps its backbone: InsightFace_Pytorch, Ascend and this project; arcface_torch
BACKBONE_KEYS = ("model", "state_dict_backbone")


@dataclass(frozen=True)
class Foreign:
    """A backbone's weights and what they are for.

    `state_dict` has the keys of `create_model(net_mode, net_depth, embedding_size)`; half-precision tensors come as
    float32. `channel_order` is "rgb" or "bgr", and `channel_order_from` says whose word that is: "caller", "file", or
    "lineage" (what the lineage's own data preparation does: likely, but nothing in such a file proves it).
    `head_kernel` is [embedding_size, classes] where the file has one.
    """

    lineage: str
    state_dict: dict
    net_mode: str
    net_depth: int | None
    embedding_size: int
    channel_order: str
    channel_order_from: str
    head_kernel: Tensor | None = None

    def __str__(self) -> str:
        depth = "" if self.net_depth is None else f" {self.net_depth}"
        head = "no head" if self.head_kernel is None else f"head of {self.head_kernel.shape[1]} classes"
        return (
            f"{self.lineage} {self.net_mode}{depth}, embedding size {self.embedding_size}, {head}, "
            f"{self.channel_order} (said by the {self.channel_order_from})"
        )


# --- the layouts: {key: shape} of each net ----------------------------------------------------------------------------


def _norm(name: str, channels: int) -> dict:
    shapes = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
    shapes[f"{name}.num_batches_tracked"] = ()
    return shapes


def _conv(name: str, out_channels: int, in_channels: int, size: int) -> dict:
    return {f"{name}.weight": (out_channels, in_channels, size, size)}


def _prelu(name: str, channels: int) -> dict:
    return {f"{name}.weight": (channels,)}


def _linear(name: str, out_features: int, in_features: int) -> dict:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def ir_layout(units, embedding_size: int, squeeze_excite: bool) -> dict:
    shapes = {**_conv("input_layer.0", 64, 3, 3), **_norm("input_layer.1", 64), **_prelu("input_layer.2", 64)}
    index, before = 0, 64
    for count, width in zip(units, WIDTHS):
        for _ in range(count):
            res, shortcut = f"body.{index}.res_layer", f"body.{index}.shortcut_layer"
            if before != width:
                shapes.update({**_conv(f"{shortcut}.0", width, before, 1), **_norm(f"{shortcut}.1", width)})
            shapes.update({**_norm(f"{res}.0", before), **_conv(f"{res}.1", width, before, 3)})
            shapes.update({**_prelu(f"{res}.2", width), **_conv(f"{res}.3", width, width, 3)})
            shapes.update(_norm(f"{res}.4", width))
            if squeeze_excite:
                shapes.update(_conv(f"{res}.5.fc1", width // 16, width, 1))
                shapes.update(_conv(f"{res}.5.fc2", width, width // 16, 1))
            index, before = index + 1, width
    shapes.update({**_norm("output_layer.0", before), **_linear("output_layer.3", embedding_size, before * 7 * 7)})
    return {**shapes, **_norm("output_layer.4", embedding_size)}


def staged_layout(units, embedding_size: int, widths=WIDTHS, bottleneck: bool = False, shared_slope: bool = False):
    """arcface_torch's iresnet, and this project's resnet with its one slope per PReLU and its bottlenecks."""

    def prelu(name, channels):
        return _prelu(name, 1 if shared_slope else channels)

    shapes = {**_conv("conv1", 64, 3, 3), **_norm("bn1", 64), **prelu("prelu", 64)}
    before = 64
    for stage, (count, width) in enumerate(zip(units, widths), start=1):
        for index in range(count):
            unit = f"layer{stage}.{index}"
            shapes.update(_norm(f"{unit}.bn1", before))
            if bottleneck:
                inner = width // 4
                shapes.update({**_conv(f"{unit}.conv1", inner, before, 1), **_norm(f"{unit}.bn2", inner)})
                shapes.update({**prelu(f"{unit}.prelu", inner), **_conv(f"{unit}.conv2", inner, inner, 3)})
                shapes.update({**_norm(f"{unit}.bn3", inner), **prelu(f"{unit}.prelu2", inner)})
                shapes.update({**_conv(f"{unit}.conv3", width, inner, 1), **_norm(f"{unit}.bn4", width)})
            else:
                shapes.update({**_conv(f"{unit}.conv1", width, before, 3), **_norm(f"{unit}.bn2", width)})
                shapes.update({**prelu(f"{unit}.prelu", width), **_conv(f"{unit}.conv2", width, width, 3)})
                shapes.update(_norm(f"{unit}.bn3", width))
            if index == 0:
                shapes.update(_conv(f"{unit}.downsample.0", width, before, 1))
                shapes.update(_norm(f"{unit}.downsample.1", width))
            before = width
    shapes.update({**_norm("bn2", before), **_linear("fc", embedding_size, before * 7 * 7)})
    return {**shapes, **_norm("features", embedding_size)}


def mobilefacenet_layout(embedding_size: int) -> dict:
    def block(name, out_channels, in_channels, size, prelu=True):
        shapes = {**_conv(f"{name}.conv", out_channels, in_channels, size), **_norm(f"{name}.bn", out_channels)}
        return {**shapes, **_prelu(f"{name}.prelu", out_channels)} if prelu else shapes

    def bottleneck(name, out_channels, in_channels, inner):
        return {
            **block(f"{name}.conv", inner, in_channels, 1),
            **block(f"{name}.conv_dw", inner, 1, 3),
            **block(f"{name}.project", out_channels, inner, 1, prelu=False),
        }

    shapes = {**block("conv1", 64, 3, 3), **block("conv2_dw", 64, 1, 3)}
    for name, out_channels, in_channels, inner in (
        ("conv_23", 64, 64, 128),
        *((f"conv_3.model.{i}", 64, 64, 128) for i in range(4)),
        ("conv_34", 128, 64, 256),
        *((f"conv_4.model.{i}", 128, 128, 256) for i in range(6)),
        ("conv_45", 128, 128, 512),
        *((f"conv_5.model.{i}", 128, 128, 256) for i in range(2)),
    ):
        shapes.update(bottleneck(name, out_channels, in_channels, inner))
    shapes.update({**block("conv_6_sep", 512, 128, 1), **block("conv_6_dw", 512, 1, 7, prelu=False)})
    return {**shapes, "linear.weight": (embedding_size, 512), **_norm("bn", embedding_size)}


# --- recognising one --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    net_mode: str
    net_depth: int | None
    layout: dict


def _embedding_size(shapes: dict, key: str) -> int:
    return shapes[key][0] if len(shapes.get(key, ())) == 1 else 0


def _read_ir(shapes: dict) -> Net:
    second_convs = [shape for key, shape in shapes.items() if re.fullmatch(r"body\.\d+\.res_layer\.3\.weight", key)]
    units = tuple(sum(shape[:1] == (width,) for shape in second_convs) for width in WIDTHS)
    squeeze_excite = any(".res_layer.5." in key for key in shapes)
    layout = ir_layout(units, _embedding_size(shapes, "output_layer.4.weight"), squeeze_excite)
    return Net("ir_se" if squeeze_excite else "ir", _depth(units, DEPTHS), layout)


def _read_mobilefacenet(shapes: dict) -> Net:
    return Net("mobilefacenet", None, mobilefacenet_layout(_embedding_size(shapes, "bn.weight")))


def _read_staged(shapes: dict) -> Net:
    units = tuple(_count(shapes, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    embedding_size = _embedding_size(shapes, "features.weight")
    if shapes.get("prelu.weight") != (1,):
        return Net("iresnet", _depth(units, DEPTHS), staged_layout(units, embedding_size))
    if "layer1.0.conv3.weight" in shapes:
        widths = tuple(4 * width for width in WIDTHS)
        layout = staged_layout(units, embedding_size, widths, bottleneck=True, shared_slope=True)
        return Net("resnet", _depth(units, RESNET_BOTTLENECK_DEPTHS), layout)
    return Net("resnet", _depth(units, RESNET_DEPTHS), staged_layout(units, embedding_size, shared_slope=True))


def _count(shapes: dict, pattern: str) -> int:
    found = (re.match(pattern, key) for key in shapes)
    return len({match[1] for match in found if match})


def _depth(units, depths: dict) -> int:
    if units not in depths:
        known = ", ".join(f"{depth} is {'-'.join(map(str, stages))}" for stages, depth in depths.items())
        raise CheckpointError(
            f"its stages have {'-'.join(map(str, units))} units, which no known depth has ({known}): "
            "cut off, or another architecture"
        )
    return depths[units]


@dataclass(frozen=True)
class Lineage:
    name: str
    marks: tuple  # keys that all of its state dicts have and no other lineage's
    read: Callable[[dict], Net]
    channel_order: str  # what nets of this lineage are trained on, unless somebody says otherwise


# InsightFace_Pytorch and Ascend's version decode their data with OpenCV and never swap the channels; arcface_torch and
# PLSC read RGB.
LINEAGES = (
    Lineage("InsightFace_Pytorch", ("input_layer.0.weight", "body.0.res_layer.1.weight"), _read_ir, "bgr"),
    Lineage("InsightFace_Pytorch", ("conv1.conv.weight", "conv2_dw.conv.weight"), _read_mobilefacenet, "bgr"),
    Lineage("arcface_torch", ("layer1.0.conv1.weight", "prelu.weight"), _read_staged, "rgb"),
)
# the third one's layout serves this project's resnet too, which has no foreign files
OWN_NAMES = {"resnet": "PLSC"}


def load_foreign(path_or_state, channel_order: str | None = None, place=None) -> Foreign:
    """Reads a backbone and says what it is, from a `.pth` file or from what such a file holds.

    Both a bare state dict and a training checkpoint (`model head optimizer epoch config`, arcface_torch's
    `state_dict_backbone`) will do, with or without DistributedDataParallel's `module.` prefix. `channel_order` ("rgb"
    or "bgr") overrides what the file says, which overrides the lineage's habit. `place`: what errors call a state
    that was read already, such as the path that it came from.

    Raises CheckpointError, one line, for a file that cannot be read, that no known net fits, or that is incomplete.
    """
    if channel_order is not None and channel_order not in CHANNEL_ORDERS:
        raise CheckpointError(f"channel_order {channel_order!r}: choose from {', '.join(CHANNEL_ORDERS)}")
    if isinstance(path_or_state, Mapping):
        content = path_or_state
    else:
        place, content = path_or_state, load_pth(path_or_state)
    try:
        return _recognise(content, channel_order)
    except CheckpointError as error:
        raise CheckpointError(f"{place or 'state dict'}: {error}") from None


def _recognise(content, channel_order: str | None) -> Foreign:
    state = _backbone_state(content)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    lineage = next((one for one in LINEAGES if all(mark in shapes for mark in one.marks)), None)
    if lineage is None:
        known = "; ".join(f"{one.name} has {' and '.join(one.marks)}" for one in LINEAGES)
        raise CheckpointError(f"no known face net: it holds {_some(list(state))}, where {known}")
    net = lineage.read(shapes)
    name = OWN_NAMES.get(net.net_mode, lineage.name)
    _compare(shapes, net, name)
    state = {key: state.get(key, torch.zeros((), dtype=torch.long)) for key in net.layout}
    final_norm = [key for key in net.layout if key.endswith("running_var")][-1]
    embedding_size = net.layout[final_norm][0]
    order, order_from = _channel_order(content, channel_order, lineage)
    return Foreign(
        lineage=name,
        state_dict=state,
        net_mode=net.net_mode,
        net_depth=net.net_depth,
        embedding_size=embedding_size,
        channel_order=order,
        channel_order_from=order_from,
        head_kernel=_head_kernel(content, embedding_size),
    )


def _backbone_state(content) -> dict:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"it holds a {type(content).__name__} where a state dict belongs")
    for key in BACKBONE_KEYS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    odd = [key for key, value in content.items() if not isinstance(value, Tensor) or not isinstance(key, str)]
    if odd:
        raise CheckpointError(
            f"no state dict in it: it holds {_some(odd)}, where a backbone is tensors by name, "
            f"at the top or under {' or '.join(map(repr, BACKBONE_KEYS))}"
        )
    state = _without_wrappers(content)
    if set(state) == {"kernel"}:
        raise CheckpointError("it is a head alone: pass the file of the backbone (model_*.pth)")
    return {key: value.float() if value.dtype in HALF else value for key, value in state.items()}


def _without_wrappers(state: Mapping) -> dict:
    state = dict(state)
    while state and any(all(key.startswith(prefix) for key in state) for prefix in WRAPPERS):
        state = {key.split(".", 1)[1]: value for key, value in state.items()}
    return state


def _compare(shapes: dict, net: Net, lineage: str) -> None:
    # torch before 0.4.1 did not count batches; the count is not read where the momentum is fixed
    missing = [key for key in net.layout if key not in shapes and not key.endswith("num_batches_tracked")]
    unknown = [key for key in shapes if key not in net.layout]
    wrong = [key for key in net.layout if key in shapes and shapes[key] != net.layout[key]]
    title = f"{lineage} {net.net_mode}" + ("" if net.net_depth is None else f" {net.net_depth}")
    if missing:
        raise CheckpointError(f"like {title}, but without {_some(missing)}: cut off, or another architecture")
    if unknown:
        raise CheckpointError(f"like {title}, but with {_some(unknown)}: another architecture")
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f"like {title}, but {_some(wrong)} of another shape ({shapes[key]} for {net.layout[key]}): "
            "another architecture"
        )


def _channel_order(content, told: str | None, lineage: Lineage) -> tuple:
    if told is not None:
        return told, "caller"
    meta = content.get("meta")
    recorded = meta.get("channel_order") if isinstance(meta, Mapping) else None
    if recorded in CHANNEL_ORDERS:
        return recorded, "file"
    return lineage.channel_order, "lineage"


def _head_kernel(content, embedding_size: int) -> Tensor | None:
    head = content.get("head")
    if not isinstance(head, Mapping) or not all(isinstance(key, str) for key in head):
        return None
    kernel = _without_wrappers(head).get("kernel")
    if kernel is None:
        return None
    if not isinstance(kernel, Tensor) or kernel.dim() != 2 or kernel.shape[0] != embedding_size:
        seen = tuple(kernel.shape) if isinstance(kernel, Tensor) else type(kernel).__name__
        raise CheckpointError(f"head kernel {seen} where [{embedding_size}, classes] belongs: the file is inconsistent")
    return kernel.float() if kernel.dtype in HALF else kernel


def _some(keys: list) -> str:
    shown = ", ".join(map(str, keys[:3]))[:200]
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown or "nothing"
