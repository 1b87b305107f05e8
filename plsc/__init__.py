"""The interface of PaddlePaddle's PLSC over this project: `from plsc import Entry` (docs/plsc.md)."""

import runtime  # noqa: F401  before torch
from plsc import environment

# Scripts read PADDLE_TRAINER_ID before they make an Entry. Only under torchrun does this set anything.
environment.share_ranks()

__version__ = "0.1.1"
__all__ = ["Entry"]


def __getattr__(name: str):
    # torch and all else only when an Entry is asked for: plsc.batch and the readers do without
    if name == "Entry":
        from plsc.entry import Entry

        return Entry
    if name == "batch":
        from plsc.reader import batch

        return batch
    if name == "ParamAttr":
        from plsc.fluid import ParamAttr

        return ParamAttr
    if name in ("config", "fluid", "models", "utils"):  # of the original, `import plsc` brought them along
        import importlib

        return importlib.import_module(f"plsc.{name}")
    raise AttributeError(f"module 'plsc' has no attribute '{name}'")
