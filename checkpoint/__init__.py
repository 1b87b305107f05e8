"""Checkpoints: `.pth` files (store), sharded directories (sharded, reshard), and remote copies of both."""

import runtime  # noqa: F401  before torch
