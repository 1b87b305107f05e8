"""Weights of other projects, recognised by the keys and shapes of their state dicts alone.

Our nets keep the keys of the projects whose weights people have (the table in `model/__init__.py` says whose), so a
file is held against the nets themselves: whatever has a net's keys and shapes is that net's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

import model
from runtime.errors import CheckpointError, ModelError

CHANNEL_ORDERS = ("rgb", "bgr")
HALF = (torch.float16, torch.bfloat16)
# what DistributedDataParallel and torch.compile put before every key
WRAPPERS = ("module.", "_orig_mod.")
# where a training checkpoint keeps its backbone: InsightFace_Pytorch, Ascend and this project; arcface_torch
BACKBONE_KEYS = ("model", "state_dict_backbone")
ANY_SIZE = 97  # stands for the embedding size where a net is looked for: no other layer is as wide


@dataclass(frozen=True)
class Foreign:
    """A backbone's weights and what they are for.

    `state_dict` has the keys of `create_model(net_mode, net_depth, embedding_size)`; half-precision tensors come as
    float32. `channel_order` is "rgb" or "bgr", and `channel_order_from` says whose word that is: "option", "file", or
    "upstream" (what that project's own data preparation does: likely, but nothing in such a file proves it).
    `head_kernel` is [embedding_size, classes] where the file has one.
    """

    upstream: str
    state_dict: dict
    net_mode: str
    net_depth: int | None
    embedding_size: int
    channel_order: str
    channel_order_from: str
    head_kernel: Tensor | None = None

    @property
    def assumed(self) -> str:
        """What to print where nothing but habit speaks for the channel order; otherwise empty."""
        if self.channel_order_from != "upstream":
            return ""
        other = "rgb" if self.channel_order == "bgr" else "bgr"
        return (
            f"the weights do not say whether they take RGB or BGR images: {self.channel_order} is assumed, as "
            f"{self.upstream} trains; pass --weights_channel_order={other} if they were trained otherwise"
        )

    def __str__(self) -> str:
        depth = "" if self.net_depth is None else f" {self.net_depth}"
        head = "no head" if self.head_kernel is None else f"head of {self.head_kernel.shape[1]} classes"
        said = {"option": "as told", "file": "as the file says", "upstream": "assumed"}[self.channel_order_from]
        return (
            f"{self.upstream} {self.net_mode}{depth}".strip() + f", embedding size {self.embedding_size}, {head}, "
            f"{self.channel_order} ({said})"
        )


@dataclass(frozen=True)
class Net:
    net_mode: str
    net_depth: int | None
    embedding_size: int
    layout: dict  # key -> shape

    def __str__(self) -> str:
        depth = "" if self.net_depth is None else f" {self.net_depth}"
        return f"{model.BACKBONES[self.net_mode].upstream or 'the'} {self.net_mode}{depth}"


@functools.lru_cache(maxsize=64)
def net_of(net_mode: str, net_depth: int | None, embedding_size: int) -> Net:
    """What create_model() would make, as keys and shapes; without memory for its numbers."""
    with _shapes_alone():
        net = model.create_model(net_mode, net_depth, embedding_size)
    return Net(
        net_mode, net_depth, embedding_size, {key: tuple(value.shape) for key, value in net.state_dict().items()}
    )


@contextmanager
def _shapes_alone():
    with ExitStack() as stack:
        if hasattr(torch.device, "__enter__"):
            stack.enter_context(torch.device("meta"))
        else:  # torch 1.x: what is never written to takes no memory, and initialising takes the time
            for name in ("kaiming_uniform_", "kaiming_normal_", "normal_", "uniform_"):
                stack.enter_context(mock.patch.object(torch.nn.init, name))
        yield


def recognise(content, channel_order: str | None = None, place=None) -> Foreign:
    """Says what the weights in `content` are: what a `.pth` file held.

    Both a bare state dict and a training checkpoint (`model head optimizer epoch config`, arcface_torch's
    `state_dict_backbone`) will do, with or without DistributedDataParallel's `module.` prefix. `channel_order` ("rgb"
    or "bgr") overrides what the file says, which overrides the habit of its upstream project. `place`: what errors call
    the content, such as the path that it came from.

    Raises CheckpointError, one line, for weights that fit no net or are incomplete.
    """
    if channel_order and channel_order not in CHANNEL_ORDERS:
        raise CheckpointError(f"channel_order {channel_order!r}: choose from {', '.join(CHANNEL_ORDERS)}")
    try:
        return _recognise(content, channel_order)
    except (CheckpointError, ModelError) as error:
        raise CheckpointError(f"{place or 'state dict'}: {error}") from None


def _recognise(content, channel_order: str | None) -> Foreign:
    state, notes = _backbone_state(content)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    if "net_mode" in meta:
        described = model.describe(meta["net_mode"], meta.get("net_depth"), meta.get("embedding_size"))
        net = net_of(described["net_mode"], described["net_depth"], described["embedding_size"])
    else:
        net = _find(shapes)
    _compare(shapes, net)
    backbone = model.BACKBONES[net.net_mode]
    said = [(channel_order, "option"), (meta.get("channel_order"), "file"), (notes, "file")]
    order, order_from = next((one for one in said if one[0] in CHANNEL_ORDERS), (backbone.channel_order, "upstream"))
    return Foreign(
        upstream="" if "net_mode" in meta else backbone.upstream,  # files that say so much are ours
        state_dict={key: _single(state.get(key, torch.zeros((), dtype=torch.long))) for key in net.layout},
        net_mode=net.net_mode,
        net_depth=net.net_depth,
        embedding_size=net.embedding_size,
        channel_order=order,
        channel_order_from=order_from,
        head_kernel=_head_kernel(content, net.embedding_size),
    )


def _backbone_state(content) -> tuple:
    """(state dict, the channel order among its notes or None)."""
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
    notes = getattr(
        content, "_metadata", None
    )  # as `create_model` left them, under a wrapper's name where there is one
    notes = notes.values() if isinstance(notes, Mapping) else ()
    order = next(
        (note["channel_order"] for note in notes if isinstance(note, Mapping) and "channel_order" in note), None
    )
    state = _without_wrappers(content)
    if set(state) == {"kernel"}:
        raise CheckpointError("it is a head alone: pass the file of the backbone (model_*.pth)")
    return state, order


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


def _without_wrappers(state: Mapping) -> dict:
    state = dict(state)
    while state and any(all(key.startswith(prefix) for key in state) for prefix in WRAPPERS):
        state = {key.split(".", 1)[1]: value for key, value in state.items()}
    return state


def _find(shapes: dict) -> Net:
    """The published net that has these keys and shapes, or the one that has the most of them."""
    best, most = None, 0
    for name, backbone in model.BACKBONES.items():
        for depth in (backbone.depths or (None,)) if backbone.upstream else ():
            net = net_of(name, depth, ANY_SIZE)
            # a last layer of another width is another embedding size, not another net
            width = shapes.get(next(key for key, shape in net.layout.items() if shape[:1] == (ANY_SIZE,)), ())[:1]
            sized = [
                (key, tuple(width[0] if size == ANY_SIZE and width else size for size in shape))
                for key, shape in net.layout.items()
            ]
            fitting = sum(shapes.get(key) == shape for key, shape in sized)
            if fitting == len(sized) == len(shapes):
                return net_of(name, depth, width[0])
            if fitting and (best is None or 2 * fitting - len(sized) > most):
                best, most = (name, depth, width[0] if width and width[0] else 1), 2 * fitting - len(sized)
    if best is None:
        known = ", ".join(model.BACKBONES)
        raise CheckpointError(f"no known face net: it holds {_some(list(shapes))}, which is in none of {known}")
    return net_of(*best)


def _compare(shapes: dict, net: Net) -> None:
    # torch before 0.4.1 did not count batches; the count is not read where the momentum is fixed
    missing = [key for key in net.layout if key not in shapes and not key.endswith("num_batches_tracked")]
    unknown = [key for key in shapes if key not in net.layout]
    wrong = [key for key in net.layout if key in shapes and shapes[key] != net.layout[key]]
    if missing:
        raise CheckpointError(f"like {net}, but without {_some(missing)}: cut off, or another architecture")
    if unknown:
        raise CheckpointError(f"like {net}, but with {_some(unknown)}: another architecture")
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f"like {net}, but {_some(wrong)} of another shape ({shapes[key]} for {net.layout[key]}): "
            "another architecture"
        )


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
    return _single(kernel)


def _some(keys: list) -> str:
    shown = ", ".join(map(str, keys[:3]))[:200]
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown or "nothing"
