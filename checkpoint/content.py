"""The checksum of what a `.pth` holds: of names, kinds, shapes and numbers, not of the bytes around them.

A zip's CRC-32 covers neither its directory nor what a reader makes of it; this covers what has been read.
"""

from __future__ import annotations

import hashlib

import torch

from runtime.errors import DamagedCheckpoint

NAME = "sha256"  # of the entry beside "model" and the others
_BLOCK_NUMBERS = 1 << 22  # of a tensor that are laid out at a time, for a table as large as the memory


def with_checksum(state):
    """`state` with an entry more, if it is a dict."""
    return {**state, NAME: checksum(state)} if type(state) is dict else state


def verified(state, path):
    """`state` without that entry. Raises DamagedCheckpoint where it says otherwise; files of others, and our older
    ones, have none."""
    if type(state) is not dict or NAME not in state:
        return state
    said = state.pop(NAME)
    if said != checksum(state):
        raise DamagedCheckpoint(
            f"{path}: damaged (what it holds is not what was saved): copy it again or take an older one"
        )
    return state


def checksum(state) -> str:
    """sha256, in hexadecimal, of nested dicts, lists and tuples of tensors and plain values; of a state dict also
    its `_metadata`."""
    digest = hashlib.sha256()
    _add(digest, state)
    return digest.hexdigest()


def _add(digest, value) -> None:
    if isinstance(value, torch.Tensor):
        _add_tensor(digest, value.detach())
    elif isinstance(value, dict):
        digest.update(b"{%d" % len(value))
        for key, item in value.items():
            _add(digest, key)
            _add(digest, item)
        _add(digest, getattr(value, "_metadata", None))
    elif isinstance(value, (list, tuple)):
        digest.update(b"%s%d" % (b"[" if isinstance(value, list) else b"(", len(value)))
        for item in value:
            _add(digest, item)
    else:
        text = f"{type(value).__name__} {value!r}".encode("utf-8", "surrogatepass")
        digest.update(b"=%d " % len(text) + text)


def _add_tensor(digest, tensor) -> None:
    # as it lies in memory: a transposed table is not copied whole
    order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
    digest.update(f"#{tensor.dtype} {tuple(tensor.shape)} {order}".encode())
    laid_out = tensor.permute(order) if order else tensor.reshape(1)
    rows = max(1, _BLOCK_NUMBERS // max(1, laid_out[:1].numel()))
    for block in laid_out.split(rows) if tensor.numel() else ():
        block = torch.view_as_real(block) if block.is_complex() else block
        flat = block.cpu().contiguous().reshape(-1)
        digest.update((flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy())
