"""What a checkpoint of ours holds, by name and kind: checked once, before anything of it is used."""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch

from runtime.errors import CheckpointError, UserError


def _tensors(value) -> bool:
    return isinstance(value, dict) and all(isinstance(item, torch.Tensor) for item in value.values())


def _count(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _optional(kind: tuple) -> tuple:
    check, words = kind
    return (lambda value: value is None or check(value)), f"{words} or nothing"


COUNT = (_count, "a whole number")
NUMBER = (_number, "a number")
NAMES = (lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value), "a list of names")
LIST = (lambda value: isinstance(value, list), "a list")
DICT = (lambda value: isinstance(value, dict), "a table of values")
TEXT = (lambda value: isinstance(value, str), "a word")
FLAG = (lambda value: isinstance(value, bool), "true or false")
TENSORS = (_tensors, "a table of tensors")
ORDER = (lambda value: value in ("rgb", "bgr"), "rgb or bgr")
MATRIX = (lambda value: isinstance(value, torch.Tensor) and value.dim() == 2, "a matrix")

# What any file of ours has, and what a training's checkpoint has beside that; with ?, what older ones lack.
NETWORK = {
    "model": TENSORS,
    "meta": {
        "net_mode": TEXT,
        "net_depth?": _optional(COUNT),
        "embedding_size": COUNT,
        "dropout?": _optional(NUMBER),
        "l2_norm?": _optional(FLAG),
        "channel_order": ORDER,
        "threshold?": _optional(NUMBER),
        "num_classes?": _optional(COUNT),
    },
}
TRAINING = {
    **NETWORK,
    "optimizer": DICT,
    "epoch": COUNT,
    "config": DICT,
    "head": DICT,
    "training": {
        "step": COUNT,
        "epoch": COUNT,
        "step_in_epoch": COUNT,
        "accuracy": NUMBER,
        "damaged": COUNT,
        "precision": DICT,
        "saved?": NAMES,
        "verified?": FLAG,
    },
}
TRAINING_PTH = {
    **TRAINING,
    "head": {"kernel": MATRIX},
    "training": {**TRAINING["training"], "rng": LIST, "head": DICT},
}


def check(state, schema: dict, path) -> None:
    """Raises CheckpointError, one line with the place, unless `state` has what `schema` names, of the kinds it says."""
    _check(state, schema, path, "")


def _check(value, schema: dict, path, place: str) -> None:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {place or 'it'} is {_kind(value)}, where {DICT[1]} belongs: take another")
    for name, kind in schema.items():
        name, optional = name.rstrip("?"), name.endswith("?")
        here = f"{place}.{name}" if place else name
        if optional and name not in value:
            continue
        if name not in value:
            raise CheckpointError(
                f"{path}: holds no {here}, so no training goes on from it: take another, or --is_finetune to start "
                "from its network"
            )
        if isinstance(kind, dict):
            _check(value[name], kind, path, here)
        elif not kind[0](value[name]):
            raise CheckpointError(f"{path}: {here} is {_kind(value[name])}, where {kind[1]} belongs: take another")


def _kind(value) -> str:
    return f"{type(value).__name__} {value!r:.40}" if type(value) in (int, float, str, bool) else type(value).__name__


@contextmanager
def fitting(path):
    """Around what takes a checked state over: what does not fit this run after all becomes one CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        RuntimeError,
        StopIteration,
        TypeError,
        ValueError,
    ) as e:
        raise CheckpointError(f"{path}: does not fit this run ({type(e).__name__}: {e}): take another") from e
