"""The parts of a backbone from its input to its embedding, for fine-tuning: what stays as it is, and who learns slower.

0 is the stem, 1 to 4 the stages of one resolution each, 5 what makes the embedding of the last one's 7x7 positions.
"""

from __future__ import annotations

import re

from torch import nn

from runtime.errors import ModelError

PARTS = 6
_STAGE_OF_WIDTH = {64: 1, 128: 2, 256: 3, 512: 4}  # the residual stages of ir and ir_se
_MOBILEFACENET = {"conv1": 0, "conv2_dw": 0, "conv_23": 1, "conv_3": 1, "conv_34": 2, "conv_4": 2, "conv_45": 3,
                  "conv_5": 3, "conv_6_sep": 4, "conv_6_dw": 5, "linear": 5, "bn": 5}  # fmt: skip


def parts_of(backbone: nn.Module) -> dict[str, int]:
    """{name of a parameter or buffer: 0..5}. A backbone of one's own says it by a method `part_of(name)`. Raises
    ModelError for one whose parts are not known."""
    state = backbone.state_dict()
    if hasattr(backbone, "part_of"):
        return {name: backbone.part_of(name) for name in state}
    first = {name.split(".")[0] for name in state}
    if "body" in first:
        width = {}
        for name, value in state.items():
            if matched := re.fullmatch(r"body\.(\d+)\.res_layer\.3\.weight", name):
                width[matched[1]] = value.shape[0]
        known = {"input_layer": 0, "output_layer": 5}
        return {name: known[name.split(".")[0]] if name.split(".")[0] in known
                else _STAGE_OF_WIDTH[width[name.split(".")[1]]] for name in state}  # fmt: skip
    if "conv_23" in first:
        return {name: _MOBILEFACENET[name.split(".")[0]] for name in state}
    if "conv_sep" in first:  # mbf: two of its layers at each resolution
        part = {"conv_sep": 4, "features": 5, **{f"layers.{number}": number // 2 for number in range(8)}}
        return {name: part[re.match(r"(layers\.)?\w+", name)[0]] for name in state}
    if "layer1" in first:
        known = {"conv1": 0, "bn1": 0, "prelu": 0, **{f"layer{stage}": stage for stage in (1, 2, 3, 4)}}
        return {name: known.get(name.split(".")[0], 5) for name in state}
    raise ModelError(
        "--freeze and --lr_decay_by_part: of this backbone no parts are known: give it a method part_of(name) -> 0 to 5"
    )


def freeze(backbone: nn.Module, parts: int) -> None:
    """Keeps the first `parts` parts as they are: no gradients, and batch norms with the statistics that they have.
    To be called again after `backbone.train()`. Raises ModelError as `parts_of`."""
    if not parts:
        return
    part = parts_of(backbone)
    for name, value in backbone.named_parameters():
        value.requires_grad_(part[name] >= parts)
    for name, module in backbone.named_modules():
        owned = [part[f"{name}.{key}"] for key, _ in (*module.named_parameters(recurse=False),
                                                     *module.named_buffers(recurse=False))]  # fmt: skip
        if owned and max(owned) < parts:
            module.eval()
