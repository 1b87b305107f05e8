"""Checkpoints: `.pth` files (store), sharded directories (sharded, reshard), remote copies, foreign weights."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message is one line with the file, the cause and the cure."""
