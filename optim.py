"""What is optimised and how: parameter groups as upstream, the choice of SGD, schedules, optimizer state by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from runtime.device import Device, owns_gradients
from runtime.errors import OptimError

logger = logging.getLogger(__name__)

BATCH_NORM = nn.modules.batchnorm._BatchNorm  # the base class has no public name

# Which share of `weight_decay` (body, output linear and class centers) take; batch norm takes none anywhere.
# InsightFace_Pytorch trains ir and ir_se with 5e-4, MobileFaceNet with 4e-5, and 4e-4 on its last linear and the
# head: 0.08 and 0.8 of the 5e-4.
DECAY_SHARES = {"mobilefacenet": (0.08, 0.8)}

SGD_KINDS = ("npu_fused_sgd", "sgd_fused", "sgd_foreach", "sgd_plain")
# What "auto" takes, from the best to the one that always works, of those that runtime.device finds on this machine.
# On cpu the plain one: foreach walks through all parameters once for each of its operations, which costs twice the time
# where they are larger than the caches (ir_50) and gains a fraction of a millisecond where they fit. The fused kernel
# takes a third of the time, a few hundredths of a step, but rounds differently: so cpu and the emulated NPU, and old
# torch and new, take the same steps.
PREFERRED = {
    # torch_npu has a kernel for torch's fused SGD only lately; before that it falls back to the host's CPU
    "npu": ("npu_fused_sgd", "sgd_foreach", "sgd_fused", "sgd_plain"),
    "cuda": ("sgd_fused", "sgd_foreach", "sgd_plain"),
    "cpu": ("sgd_plain",),
}

Schedule = Callable[[int], float]


def head_weight_decay(net_mode: str, weight_decay: float = 5e-4) -> float:
    """The weight decay of the class centers, which follow the output linear's."""
    return weight_decay * DECAY_SHARES.get(net_mode, (1.0, 1.0))[1]


def parameter_groups(
    model: nn.Module, net_mode: str, weight_decay: float = 5e-4, decay_norms: bool = False, rates=None
) -> list[dict]:
    """Groups of `model`'s parameters for an optimizer: weight decay on all but batch norm's weight and bias, and on
    those too with decay_norms, as arcface_torch and PLSC have it.

    As in InsightFace_Pytorch, PReLU's slopes and the biases of linear layers decay with the rest. Parameters with
    requires_grad=False are left out; OptimError where that leaves none. rates: {name of a parameter: factor of its
    learning rate}; a group then carries its factor as "lr_factor", which `set_lr` obeys.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORM) and not decay_norms]
    in_batch_norm = {id(p) for module in norms for p in module.parameters(recurse=False)}
    trained = [p for p in model.parameters() if p.requires_grad]
    normal = [p for p in trained if id(p) in in_batch_norm]
    decayed = [p for p in trained if id(p) not in in_batch_norm]
    body_share, output_share = DECAY_SHARES.get(net_mode, (1.0, 1.0))
    body, output = (decayed, []) if body_share == output_share else (decayed[:-1], decayed[-1:])
    groups = [
        (body, weight_decay * body_share),
        (output, weight_decay * output_share),
        (normal, 0.0),
    ]
    groups = [{"params": params, "weight_decay": decay} for params, decay in groups if params]
    if rates is not None:
        factor = {id(p): rates[name] for name, p in model.named_parameters()}
        groups = [
            {**group, "params": [p for p in group["params"] if factor[id(p)] == one], "lr_factor": one}
            for group in groups
            for one in sorted({factor[id(p)] for p in group["params"]})
        ]
    if not groups:
        raise OptimError(f"{net_mode}: no parameter is trained: every one has requires_grad=False")
    return groups


def make_sgd(
    groups: Sequence[dict], lr: float, momentum: float, device: Device, kind: str = "auto"
) -> torch.optim.Optimizer:
    """SGD with momentum over `groups`, in the fastest formulation that this device has.

    kind: one of SGD_KINDS by name (OptimError where it does not exist here), or "auto": the first of PREFERRED.
    NpuFusedSGD lays parameters and gradients out in one piece of memory: once it has stepped, neither a parameter nor
    its .grad may be replaced, only written to, and DistributedDataParallel must not make gradients views of buckets.
    """
    available = _sgd_kinds(groups, device)
    if kind == "auto":
        kind = next(k for k in PREFERRED[device.kind] if k in available)
    if kind not in available:
        raise OptimError(f"SGD '{kind}' does not exist on {device.kind} here: choose from auto, {', '.join(available)}")
    options = {"lr": lr, "momentum": momentum}
    if kind == "npu_fused_sgd":
        optimizer = device.fused_sgd_class()(groups, **options)
    elif kind == "sgd_fused":
        optimizer = torch.optim.SGD(groups, fused=True, **options)
    elif _sgd_takes("foreach"):
        optimizer = torch.optim.SGD(groups, foreach=kind == "sgd_foreach", **options)
    else:
        optimizer = torch.optim.SGD(groups, **options)
    if momentum:
        # torch makes these at the first step, and the fused kernel leaves them uninitialised where that step is
        # skipped because of an overflow. From zeros the first step comes out the same: 0 * momentum + gradient.
        for p in _parameters(optimizer):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def sgd_kind(optimizer: torch.optim.Optimizer) -> str:
    """Which of SGD_KINDS make_sgd built."""
    if owns_gradients(optimizer):
        return "npu_fused_sgd"
    return next((f"sgd_{how}" for how in ("fused", "foreach") if optimizer.defaults.get(how)), "sgd_plain")


def _sgd_kinds(groups: Sequence[dict], device: Device) -> list[str]:
    """The kinds that device and dtypes allow, best first."""
    dtypes = {p.dtype for group in groups for p in group["params"]}
    have = set(device.fused_optimizers()) | {"sgd_plain"}
    if not dtypes <= {torch.float32, torch.float16}:
        have.discard("npu_fused_sgd")
    if device.kind == "cpu" and not dtypes <= {torch.float32, torch.float64}:
        # torch 2.13's fused SGD on CPU updates half and bfloat16 tensors of 16 elements and more wrongly
        have.discard("sgd_fused")
    return [k for k in SGD_KINDS if k in have]


def _sgd_takes(option: str) -> bool:
    return option in torch.optim.SGD.__init__.__code__.co_varnames


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of every group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def milestones(base_lr: float, epochs: Sequence[int], gamma: float = 0.1, steps_per_epoch: int = 1) -> Schedule:
    """base_lr, times gamma from the start of each epoch in `epochs` on (epochs count from 0).

    With steps_per_epoch=1 the milestones are steps, as PLSC's lr_steps.
    """
    starts = [int(epoch) * steps_per_epoch for epoch in epochs]
    return lambda step: base_lr * gamma ** sum(step >= start for start in starts)


def polynomial(base_lr: float, power: float, total_steps: int, first_step: int = 0) -> Schedule:
    """base_lr up to first_step (where a warm-up ends), then falling to 0 at total_steps as (1 - t) ** power."""
    return lambda step: base_lr * (1.0 - _share(step, first_step, total_steps)) ** power


def cosine(base_lr: float, total_steps: int, first_step: int = 0) -> Schedule:
    """The same as half a cosine (arXiv 1608.03983, equation 5, without restarts)."""
    return lambda step: base_lr * 0.5 * (1.0 + math.cos(math.pi * _share(step, first_step, total_steps)))


def _share(step: int, first: int, last: int) -> float:
    """How far `step` is on the way from `first` to `last`, within 0 and 1."""
    return min(1.0, max(0.0, (step - first) / max(1, last - first)))


def with_warmup(schedule: Schedule, warmup_steps: int) -> Schedule:
    """`schedule` with a linear rise over the first warmup_steps: its 1/warmup_steps at step 0, and no step at 0."""
    if warmup_steps <= 0:
        return schedule
    return lambda step: schedule(step) * min(1.0, (step + 1) / warmup_steps)


def range_test(step: Callable[[float], float], lowest: float = 1e-6, highest: float = 10.0, steps: int = 100):
    """Learning-rate range test (arXiv 1506.01186): raises the rate from lowest to highest over `steps` updates.

    step: one update at that rate -> its loss. Stops early where the smoothed loss passes four times its lowest.
    Returns (rates, smoothed losses).
    """
    rates, losses, smooth = [], [], 0.0
    for i in range(steps):
        lr = lowest * (highest / lowest) ** (i / max(1, steps - 1))
        smooth = 0.95 * smooth + 0.05 * step(lr)
        rates.append(lr)
        losses.append(smooth / (1 - 0.95 ** (i + 1)))  # the mean's start from zero, corrected
        if not losses[-1] < 4 * min(losses):
            break
    return rates, losses


def range_figure(rates: Sequence[float], losses: Sequence[float]):
    """The smoothed loss over the learning rate, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=150, constrained_layout=True)
    axes = figure.add_subplot()
    axes.plot(rates, losses)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, smoothed")
    return figure


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[str, torch.Tensor]) -> dict:
    """{"kind": of the optimizer, "state": {parameter name: {"momentum_buffer": tensor}}}, half precision widened to
    fp32; of other optimizers than SGD whatever tensors and numbers they keep.

    names: what is optimised under each name (Precision.names). Learning rate, decay and momentum are left out:
    config and schedule say them. So the state fits every precision policy, SGD kind and torch version.
    """
    state = {}
    for name, p in names.items():
        values = {k: v for k, v in optimizer.state.get(p, {}).items() if isinstance(v, (torch.Tensor, int, float))}
        state[name] = {k: _kept(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    return {"kind": _kind(optimizer), "state": state}


def _kept(value: torch.Tensor) -> torch.Tensor:
    return value.detach().float() if value.element_size() < 4 else value.detach()


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """Optimizers of one kind go on from each other's state."""
    return "SGD" if owns_gradients(optimizer) else type(optimizer).__name__


@torch.no_grad()
def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict, names: Mapping[str, torch.Tensor]) -> None:
    """Writes what optimizer_state() gave into this optimizer, in place, in the types that it holds. The state of
    another kind of optimizer is of no use to it: then it begins anew, and says so.

    Raises OptimError where a name is missing, unknown or of another shape; the optimizer is then as it was.
    """
    state = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise OptimError("this optimizer state is not by parameter name: another program wrote it; fine-tune instead")
    unknown, missing = sorted(set(state) - set(names)), sorted(set(names) - set(state))
    if unknown or missing:
        raise OptimError(
            f"the optimizer state is of another network: it lacks {len(missing)} parameters of this one"
            f"{_first(missing)}, and has {len(unknown)} more{_first(unknown)}"
        )
    kind = saved.get("kind", "SGD")
    if kind != _kind(optimizer):
        logger.warning("the checkpoint's optimizer is %.40r: %s begins anew", kind, _kind(optimizer))
        return
    if any(state.values()) and not any(optimizer.state.get(p) for p in names.values()):
        _make_state(optimizer)
    for name, p in names.items():
        for key, own in optimizer.state.get(p, {}).items():
            value = state[name].get(key)
            if isinstance(own, torch.Tensor) and getattr(value, "shape", None) != own.shape:
                found = "nothing" if value is None else list(getattr(value, "shape", []))
                raise OptimError(f"optimizer state, {key} of '{name}': {found} where {list(own.shape)} is needed")
            if isinstance(own, (int, float)) and type(value) is not type(own):
                raise OptimError(f"optimizer state, {key} of '{name}': {value!r:.40} where a number is needed")
    for name, p in names.items():
        for key, own in optimizer.state.get(p, {}).items():
            if isinstance(own, torch.Tensor):
                own.copy_(state[name][key])
            elif isinstance(own, (int, float)):
                optimizer.state[p][key] = state[name][key]


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """torch's optimizers make their state at the first step: one that moves nothing, before any gradient is there."""
    rates = [group["lr"] for group in optimizer.param_groups]
    set_lr(optimizer, 0.0)
    for p in _parameters(optimizer):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, lr in zip(optimizer.param_groups, rates):
        group["lr"] = lr


def _first(lacking: list[str]) -> str:
    return f" ('{lacking[0]}' first)" if lacking else ""
