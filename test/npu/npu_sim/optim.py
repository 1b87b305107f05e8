"""What becomes torch_npu.optim."""

from __future__ import annotations

import torch


class NpuFusedSGD(torch.optim.Optimizer):
    """SGD with torch's arithmetic over tensors that share one piece of memory, as torch_npu's fused SGD.

    At the first step or zero_grad with gradients, parameters, gradients and momentum of a group and dtype move into
    memory of their own, in which the update is one operation. Hence the restrictions: fp32 and fp16 alone, zero_grad
    only in place (both raise), and no parameter, gradient or momentum buffer may be replaced, come or go afterwards:
    nobody notices, and the optimizer goes on with its old memory for ever.

    MARK: what says so; "is_npu_fused_optimizer" in torch_npu 1.8.1, 1.11 and 2.0.1.
    """

    MARK = "is_fused_optimizer"

    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
            },
        )
        setattr(self, self.MARK, True)
        self.is_params_grads_combined = False
        self._pieces = None

    @torch.no_grad()
    def zero_grad(self, set_to_none=False):
        if set_to_none:
            raise ValueError("set_to_none is not supported in fused optimizers")
        self._combine()
        for piece in self._pieces or ():
            piece.grad.zero_()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        self._combine()
        for piece in self._pieces or ():
            piece.update()
        return loss

    def _combine(self):
        if not self.is_params_grads_combined and any(
            p.grad is not None for group in self.param_groups for p in group["params"]
        ):
            self._pieces = [
                _Piece(group, params, self.state)
                for group in self.param_groups
                for params in _by_dtype(group["params"])
            ]
            self.is_params_grads_combined = True


def _by_dtype(params):
    params = [p for p in params if p.grad is not None]
    for p in params:
        if p.dtype not in (torch.float32, torch.float16):
            raise TypeError(f"Fused optimizer's parameters must be either float32 or float16, but received {p.dtype}")
        if p.device.type != "npu":
            raise RuntimeError(f"Tensors to combine must be on NPU, got {p.device.type}.")
    return [same for dtype in (torch.float32, torch.float16) if (same := [p for p in params if p.dtype == dtype])]


class _Piece:
    """The parameters of one group and dtype that had a gradient at the first step."""

    def __init__(self, group, params, state):
        self.group, self.params = group, params
        self.buffers = [state[p].get("momentum_buffer") for p in params] if group["momentum"] else []
        self.first = any(buffer is None for buffer in self.buffers)
        if self.first:  # the first update is the decayed gradient alone
            self.buffers = [torch.zeros_like(p.grad) for p in params]
        self.param = _move_together(params)
        self.grad = _move_together([p.grad for p in params])
        self.buffer = _move_together(self.buffers) if self.buffers else None
        for p, buffer in zip(params, self.buffers):
            state[p]["momentum_buffer"] = buffer

    def update(self):
        group, change = self.group, self.grad
        if group["weight_decay"]:
            change = change.add(self.param, alpha=group["weight_decay"])
        if self.buffer is not None:
            if self.first:
                self.buffer.copy_(change)
            else:
                self.buffer.mul_(group["momentum"]).add_(change, alpha=1 - group["dampening"])
            self.first = False
            change = change.add(self.buffer, alpha=group["momentum"]) if group["nesterov"] else self.buffer
        self.param.add_(change, alpha=-group["lr"])


def _move_together(tensors):
    """One new flat tensor that holds the values; each tensor becomes a view of its part, in its own strides."""
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=tensors[0].dtype, device=tensors[0].device)
    start = 0
    for t in tensors:
        place = flat.as_strided(t.shape, t.stride(), start)
        place.copy_(t)
        t.data = place
        start += t.numel()
    return flat
