"""Checkpoints: `.pth` files (store), sharded directories (sharded, reshard), remote copies, foreign weights."""
