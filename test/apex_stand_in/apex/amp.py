"""apex.amp as its documentation describes it: initialize, scale_loss, master_params, state_dict, load_state_dict.

What real apex refuses is refused here: another opt_level, scale_loss before initialize, an optimizer that initialize
did not return, a positional argument where the documentation has keywords. `calls` remembers what initialize was given.
"""

from __future__ import annotations

import contextlib
import types

import torch
from torch import nn

calls: list[dict] = []
_scalers: list[_Scaler] = []


class _Scaler:
    def __init__(self, loss_scale):
        self.dynamic = loss_scale == "dynamic"
        self.loss_scale = 2.0**16 if self.dynamic else float(loss_scale)
        self.unskipped = 0

    def update(self, overflow):
        if self.dynamic and overflow:
            self.loss_scale, self.unskipped = self.loss_scale / 2, 0
        elif self.dynamic:
            self.unskipped += 1
            if self.unskipped == 2000:
                self.loss_scale, self.unskipped = min(2.0**24, self.loss_scale * 2), 0


def initialize(models, optimizers=None, enabled=True, opt_level="O1", *, loss_scale=None, verbosity=1):
    if opt_level not in ("O0", "O1", "O2"):
        raise RuntimeError(f"Unexpected optimization level {opt_level}")
    if loss_scale is None:
        loss_scale = 1.0 if opt_level == "O0" else "dynamic"
    calls.append({"opt_level": opt_level, "loss_scale": loss_scale})
    _scalers[:] = [_Scaler(loss_scale)]
    optimizers._initialized = True
    optimizers._pairs = []
    optimizers._patched = False
    if opt_level == "O1":
        plain = models.forward

        def forward(self, *inputs):
            with torch.autocast("cpu", dtype=torch.float16):
                return plain(*inputs)

        models.forward = types.MethodType(forward, models)
    if opt_level == "O2":
        _half(models, optimizers)
    return models, optimizers


def _half(model, optimizer):
    masters = {}
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            for p in module.parameters(recurse=False):
                masters[p] = nn.Parameter(p.detach().clone())
                p.data = p.data.half()
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.half())
    for group in optimizer.param_groups:
        group["params"] = [masters.get(p, p) for p in group["params"]]
    for p, master in masters.items():
        if p in optimizer.state:
            optimizer.state[master] = optimizer.state.pop(p)
    optimizer._pairs = list(masters.items())
    forward, step, zero_grad = model.forward, optimizer.step, optimizer.zero_grad

    def cast_forward(self, *inputs):
        return forward(*[x.half() for x in inputs]).float()

    def step_and_copy(self, closure=None):
        step()
        for p, master in self._pairs:
            p.data.copy_(master.data)

    def zero_all(self):
        zero_grad()
        for p, master in self._pairs:
            p.grad = master.grad = None

    model.forward = types.MethodType(cast_forward, model)
    optimizer.step = types.MethodType(step_and_copy, optimizer)
    optimizer.zero_grad = types.MethodType(zero_all, optimizer)


@contextlib.contextmanager
def scale_loss(loss, optimizers, loss_id=0, model=None, delay_unscale=False):
    if not getattr(optimizers, "_initialized", False):
        raise RuntimeError("Invoked 'with amp.scale_loss`, but internal Amp state has not been initialized")
    scaler = _scalers[loss_id]
    own = [p for p in master_params(optimizers) if id(p) not in {id(m) for _, m in optimizers._pairs}]
    earlier = [(p, p.grad) for p in own]
    for p in own:
        p.grad = None
    yield loss.float() * scaler.loss_scale
    for p, master in optimizers._pairs:
        if p.grad is not None:
            grad = p.grad.float() / scaler.loss_scale
            master.grad = grad if master.grad is None else master.grad + grad
            p.grad = None
    for p, grad in earlier:
        if p.grad is not None:
            p.grad = p.grad / scaler.loss_scale if grad is None else grad + p.grad / scaler.loss_scale
    grads = [p.grad for p in master_params(optimizers) if p.grad is not None]
    overflow = not all(bool(torch.isfinite(g).all()) for g in grads)
    scaler.update(overflow)
    if overflow and not optimizers._patched:
        optimizers._patched = True
        real = optimizers.step

        def skip(self, closure=None):
            for p in master_params(self):
                p.grad = None
            self.step, self._patched = real, False

        optimizers.step = types.MethodType(skip, optimizers)


def master_params(optimizer):
    for group in optimizer.param_groups:
        yield from group["params"]


def state_dict():
    return {f"loss_scaler{i}": {"loss_scale": s.loss_scale, "unskipped": s.unskipped} for i, s in enumerate(_scalers)}


def load_state_dict(state):
    for scaler, values in zip(_scalers, state.values()):
        scaler.loss_scale, scaler.unskipped = values["loss_scale"], values["unskipped"]
