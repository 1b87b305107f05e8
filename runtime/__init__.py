"""The machine: device, ranks, row shards, precision, log. Nothing here knows about faces.

Two settings are read when torch is imported, so they are made here, and each package with commands that begin with
torch imports this first. OpenMP's threads, which spin while they wait, take the cores from every other process unless
they are told to sleep. A recent torch loads Ascend's plugin, and dies with a traceback where CANN is missing: it is
switched off, and runtime.device imports it when asked for. What the user has set holds.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
