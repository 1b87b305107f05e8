"""The originals' own weights: PLSC 0.1's folder of variable files with meta.json, and `.pdparams`.

A variable file is uint32 version, uint64 levels of detail (each uint64 bytes and those), uint32 version, int32 length
of a protobuf message (field 1: data type, field 2: dimensions), and the raw values. Names count: conv2d_3.w_0. A
`.pdparams` is a pickled dict of arrays in the order in which the network was made. Nothing in either is run.
"""

from __future__ import annotations

import json
import pickle  # for its table of instructions; reading goes through data.safe_pickle
import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import safe_pickle
from runtime.errors import CheckpointError, DataError

_DTYPES = {2: np.int32, 3: np.int64, 4: np.float16, 5: np.float32, 6: np.float64}
_MOST_BYTES = 1 << 40
_NORM = ("weight", "bias", "running_mean", "running_var")
_HEAD = re.compile(r"dist@(?:arcface|softmax|margin_softmax)@rank@(\d{5})\.(w|b)_0")


def is_original(folder) -> bool:
    """Whether a folder holds PLSC 0.1's variable files, or it is a .pdparams file itself."""
    folder = Path(folder)
    return folder.suffix == ".pdparams" or (folder / "meta.json").is_file() and (folder / "conv2d_0.w_0").is_file()


def load(path, backbone: nn.Module) -> dict:
    """The state dict of `backbone` with the weights at `path`, and under "head" what there is of the class centers:
    {"kernel": [D, C], "bias": [C] or None}, else None. Raises CheckpointError, one line, for what does not fit."""
    path = Path(path)
    try:
        named = _read_pdparams(path) if path.suffix == ".pdparams" else _read_folder(path)
        head = _head(path) or _softmax_head(named, backbone)
        return {"model": _fitted(named, backbone), "head": head}
    except (OSError, struct.error, DataError) as error:
        raise CheckpointError(f"{path}: cannot be read as PLSC's weights ({error})") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_variable(path) -> np.ndarray:
    """One variable file. Raises CheckpointError where it is cut off or no such file."""
    data = Path(path).read_bytes()
    at = 4
    try:
        (version, levels) = struct.unpack_from("<IQ", data)
        at = 12
        for _ in range(min(levels, 16)):
            (size,) = struct.unpack_from("<Q", data, at)
            at += 8 + size
        (again, length) = struct.unpack_from("<Ii", data, at)
        at += 8
        if version or again or levels > 16 or not 0 < length <= len(data) - at:
            raise CheckpointError(f"{Path(path).name} is no variable of PLSC")
        dtype, dims = _descriptor(data[at : at + length])
    except (struct.error, IndexError, OverflowError):
        raise CheckpointError(f"{Path(path).name} is cut off") from None
    at += length
    count = 1
    for size in dims:
        count *= size
    if dtype not in _DTYPES or any(size < 0 for size in dims):
        raise CheckpointError(f"{Path(path).name} holds values of type {dtype} {dims}, which are not read")
    if count * np.dtype(_DTYPES[dtype]).itemsize != len(data) - at:
        raise CheckpointError(f"{Path(path).name} says {dims} and holds {len(data) - at} bytes: cut off")
    return np.frombuffer(data, _DTYPES[dtype], count, at).reshape(dims)


def _descriptor(message: bytes) -> tuple[int, list[int]]:
    """(data type, dimensions) of a TensorDesc message."""
    dtype, dims, at = -1, [], 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if not byte & 128:
                return value if value < 1 << 63 else value - (1 << 64)
            if shift > 63:
                raise CheckpointError("a variable's description is damaged")

    while at < len(message):
        tag = varint()
        if tag == 8:
            dtype = varint()
        elif tag == 16:
            dims.append(varint())
        elif tag == 18:
            stop = varint() + at
            while at < stop:
                dims.append(varint())
        else:
            raise CheckpointError("a variable's description is damaged")
    return dtype, dims


def _read_folder(folder: Path) -> dict[str, list]:
    """The variables by kind, each kind in the order in which it was made."""
    meta = _meta(folder)
    found = {"conv": [], "norm": [], "prelu": [], "fc": []}
    for kind, pattern, parts in (
        ("conv", "conv2d_{}", ("w_0",)),
        ("norm", "batch_norm_{}", ("w_0", "b_0", "w_1", "w_2")),
        ("prelu", "prelu_{}", ("w_0",)),
        ("fc", "fc_{}", ("w_0", "b_0")),
    ):
        number = 0
        while (folder / f"{pattern.format(number)}.{parts[0]}").is_file():
            stem = pattern.format(number)
            found[kind].append([read_variable(folder / f"{stem}.{part}") for part in parts])
            number += 1
    found["width"] = meta.get("emb_dim")
    return found


def _meta(folder: Path) -> dict:
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"its meta.json cannot be read ({error}): is the folder a checkpoint?") from None
    if not isinstance(meta, dict):
        raise CheckpointError("its meta.json is damaged")
    return meta


def _read_pdparams(path: Path) -> dict[str, list]:
    found = {"conv": [], "norm": [], "prelu": [], "fc": [], "width": None}
    norm, linear = [], ""
    for name, value in _unpickled(path).items():
        value = safe_pickle.as_array(value)
        if not isinstance(value, np.ndarray) or name.startswith("block_list."):  # listed twice
            continue
        if value.ndim == 4:
            found["conv"].append([value])
        elif value.ndim == 2:
            found["fc"].append([value])
            linear = name.rpartition(".")[0]
        elif linear and name.rpartition(".")[0] == linear:
            found["fc"][-1].append(value)
        elif value.size == 1 or "prelu" in name:
            found["prelu"].append([value.reshape(-1)])
        else:
            norm.append(value)
            if len(norm) == 4:
                found["norm"].append(norm)
                norm = []
    return found


class _WithDicts(safe_pickle._Unpickler):
    """What data.safe_pickle admits, and dicts."""

    dispatch = safe_pickle._Instructions(
        {
            **safe_pickle._Unpickler.dispatch,
            **{
                getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
                for name in ("EMPTY_DICT", "SETITEM", "SETITEMS", "LONG4")
            },
        }
    )


def _unpickled(path: Path) -> dict:
    try:
        value = _WithDicts(path.read_bytes()).load()
    except safe_pickle._Refused as error:
        raise CheckpointError(f"refused: the pickle holds {error}, and only arrays by name are read") from None
    except OSError:
        raise
    except Exception as error:  # a broken pickle fails in a dozen ways
        raise CheckpointError(f"is no whole .pdparams ({type(error).__name__})") from None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise CheckpointError("holds no arrays by name")
    return value


def _fitted(found: dict, backbone: nn.Module) -> dict[str, torch.Tensor]:
    kinds = (
        ("conv", nn.Conv2d, ("weight",)),
        ("norm", nn.modules.batchnorm._BatchNorm, _NORM),
        ("prelu", nn.PReLU, ("weight",)),
        ("fc", nn.Linear, ("weight", "bias")),
    )
    state = backbone.state_dict()
    for kind, module_class, parts in kinds:
        modules = [(name, module) for name, module in backbone.named_modules() if isinstance(module, module_class)]
        if len(modules) != len(found[kind]):
            raise CheckpointError(
                f"holds {len(found[kind])} layers of kind {kind}, and {type(backbone).__name__} has {len(modules)}: "
                "set model_name, or set_model, to the network that was trained"
            )
        for (name, _module), values in zip(modules, found[kind]):
            for part, value in zip(parts, values):
                value = torch.from_numpy(np.array(value, np.float32))
                if kind == "fc" and part == "weight":
                    value = value.t().contiguous()  # Paddle keeps [in, out]
                if state[f"{name}.{part}"].shape != value.shape:
                    raise CheckpointError(
                        f"{name}.{part} is {list(value.shape)} there and {list(state[f'{name}.{part}'].shape)} in "
                        f"{type(backbone).__name__}: another network, or another set_emb_size"
                    )
                state[f"{name}.{part}"] = value
    return state


def _softmax_head(found: dict, backbone: nn.Module):
    """The classifier of data parallel softmax, which stands behind the network's own fc layers; it leaves `found`."""
    own = sum(isinstance(module, nn.Linear) for module in backbone.modules())
    if len(found["fc"]) != own + 1 or len(found["fc"][-1]) != 2:
        return None
    kernel, bias = found["fc"].pop()
    return {name: torch.from_numpy(np.array(v, np.float32)) for name, v in (("kernel", kernel), ("bias", bias))}


def _head(folder: Path):
    """The class centers of PLSC 0.1's folder, the shards one after the other."""
    if not folder.is_dir():
        return None
    shards: dict[str, dict[int, Path]] = {"w": {}, "b": {}}
    for path in folder.iterdir():
        match = _HEAD.fullmatch(path.name)
        if match:
            shards[match[2]][int(match[1])] = path
    if not shards["w"] and (folder / "final_fc_w_0").is_file():
        shards["w"][0] = folder / "final_fc_w_0"
    if not shards["w"]:
        return None
    ranks = _meta(folder).get("pretrain_nranks")
    if sorted(shards["w"]) != list(range(len(shards["w"]))) or isinstance(ranks, int) and ranks != len(shards["w"]):
        raise CheckpointError(f"{len(shards['w'])} parts of the class centers for {ranks} ranks: some are missing")
    kernel = np.concatenate([read_variable(shards["w"][rank]) for rank in sorted(shards["w"])], axis=1)
    bias = [read_variable(shards["b"][rank]).reshape(-1) for rank in sorted(shards["b"])]
    return {
        "kernel": torch.from_numpy(kernel.astype(np.float32)),
        "bias": torch.from_numpy(np.concatenate(bias).astype(np.float32)) if bias else None,
    }
