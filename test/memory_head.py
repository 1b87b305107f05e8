"""Peak memory of a head's steps: `python memory_head.py '[<MarginHead keywords>, ...]'` (JSON).

Prints a JSON list: for each case the bytes above what the process had before that head was built. Run it with
MALLOC_MMAP_THRESHOLD_ set, so that what is freed is given back and the process's size is what is in use.
"""

from __future__ import annotations

import gc
import json
import sys

import torch

from head.head import MarginHead
from runtime.device import Device


def steps(classes, dim, batch, accumulate=1, **kw):
    for name in ("dtype", "momentum_dtype"):
        if name in kw:
            kw[name] = getattr(torch, kw[name])
    head = MarginHead(classes, dim, **kw)
    emb_BD = torch.randn(batch, dim).requires_grad_()
    label_B = torch.randint(classes, (batch,))
    for _ in range(accumulate):
        head(emb_BD, label_B).loss.backward()
    head.step(0.1)


def peak(case, device) -> int:
    steps(**{**case, "classes": 5000})  # what the libraries keep for themselves
    gc.collect()
    device.reset_peak_memory()
    before = device.memory_allocated()
    steps(**case)
    return device.max_memory_allocated() - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps([peak(case, Device("cpu")) for case in json.loads(sys.argv[1])]) + "\n")
