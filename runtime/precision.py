"""Precision policies O0, O1, O2, fp16, bf16, bf16_master: what a step computes in, and when it is skipped.

One step under every policy (Precision.backward and Precision.step):
loss * scale -> backward -> gradients to fp32 and back to their true size -> one inf or nan anywhere, the head's
gradients included? -> the ranks agree (maximum) -> clip -> every rank updates, or every rank skips
-> fp32 masters are copied into the half weights -> the scale follows PLSC's six parameters.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from runtime.device import Device
from runtime.dist import ALONE, World
from runtime.errors import DeviceError, PrecisionError

BATCH_NORM = nn.modules.batchnorm._BatchNorm  # the base class has no public name
LARGEST_FP16 = 65504.0
# Chips of the first Ascend generations saturate at LARGEST_FP16 where others give inf: an overflow is found by size.
SATURATING_CHIPS = {
    "Ascend910A", "Ascend910B", "Ascend910ProA", "Ascend910ProB", "Ascend910PremiumA",
    "Ascend310P1", "Ascend310P2", "Ascend310P3", "Ascend310P4",
}  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """What a policy keeps in which type. weights: of all layers but batch norm, which stays fp32."""

    name: str
    meaning: str
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    masters: bool = False  # fp32 copies of the half weights, which the optimizer updates
    scaled: bool = False  # fp16 gradients underflow unless the loss is scaled; bfloat16 has fp32's range

    @property
    def compute(self) -> torch.dtype:
        """The type of convolutions and matrix products."""
        return self.autocast or self.weights


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("O0", "fp32"),
        Policy("O1", "fp32 weights, autocast to fp16", autocast=torch.float16, scaled=True),
        Policy("O2", "fp16 weights with fp32 masters", weights=torch.float16, masters=True, scaled=True),
        Policy("fp16", "fp16 weights without masters (arcface_paddle's)", weights=torch.float16, scaled=True),
        Policy("bf16", "fp32 weights, autocast to bfloat16", autocast=torch.bfloat16),
        Policy("bf16_master", "bfloat16 weights with fp32 masters", weights=torch.bfloat16, masters=True),
    )
}


@dataclass(frozen=True)
class LossScaling:
    """PLSC's six parameters of loss scaling, with its meaning; policies without fp16 do not scale.

    After incr_every_n_steps good steps in a row the scale is multiplied by incr_ratio, after decr_every_n_nan_or_inf
    bad steps in a row by decr_ratio, though not below 1 (or below init_loss_scaling, where that is smaller).
    use_dynamic_loss_scaling=False: the scale stays init_loss_scaling, and the other four say nothing.
    """

    init_loss_scaling: float = 2.0**16
    incr_every_n_steps: int = 2000
    decr_every_n_nan_or_inf: int = 2
    incr_ratio: float = 2.0
    decr_ratio: float = 0.5
    use_dynamic_loss_scaling: bool = True

    def __post_init__(self) -> None:
        allowed = {
            "init_loss_scaling": (0 < self.init_loss_scaling < math.inf, "a positive number such as 128.0"),
            "incr_every_n_steps": (self.incr_every_n_steps >= 1, "1 or more steps"),
            "decr_every_n_nan_or_inf": (self.decr_every_n_nan_or_inf >= 1, "1 or more steps"),
            "incr_ratio": (1 < self.incr_ratio < math.inf, "more than 1"),
            "decr_ratio": (0 < self.decr_ratio < 1, "between 0 and 1"),
        }
        for name, (good, wanted) in allowed.items():
            if not good:
                raise PrecisionError(f"{name} {getattr(self, name)}: give {wanted}")

    @property
    def smallest(self) -> float:
        """The scale under which it does not fall."""
        return min(1.0, self.init_loss_scaling) if self.use_dynamic_loss_scaling else self.init_loss_scaling


def parse_loss_scale(text: str | float, **six) -> LossScaling:
    """A fixed scale ("128.0"), or "dynamic": dynamic scaling with PLSC's parameters `six` (LossScaling's fields).

    Raises PrecisionError in one line for anything else: 0, a negative number, a word.
    """
    scaling = LossScaling(**six)
    if str(text).strip().lower() == "dynamic":
        return replace(scaling, use_dynamic_loss_scaling=True)
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value < math.inf:
        raise PrecisionError(f"loss_scale '{text}': give a positive number such as 128.0, or 'dynamic'")
    return replace(scaling, init_loss_scaling=value, use_dynamic_loss_scaling=False)


class LossScale:
    """The scale and its counters as 0-dim fp32 tensors on the device, so that no step waits for the host."""

    def __init__(self, scaling: LossScaling, device: torch.device) -> None:
        self.scaling = scaling
        self.value = torch.tensor(float(scaling.init_loss_scaling), device=device)
        self.good, self.bad, self.skipped, self.stuck = (torch.zeros((), device=device) for _ in range(4))

    def count(self, found_inf: torch.Tensor) -> None:
        """Skipped steps, and those in a row that no smaller scale could have saved. found_inf: 0-dim, 0.0 or 1.0."""
        at_smallest = (self.value <= self.scaling.smallest).float()
        self.skipped = self.skipped + found_inf
        self.stuck = (self.stuck + at_smallest) * found_inf

    def adjust(self, found_inf: torch.Tensor) -> None:
        """The dynamic scale after a step; equals torch.amp.GradScaler's where decr_every_n_nan_or_inf is 1."""
        rules = self.scaling
        if not rules.use_dynamic_loss_scaling:
            return
        self.good = (self.good + 1) * (1 - found_inf)
        self.bad = (self.bad + 1) * found_inf
        grow, shrink = self.good >= rules.incr_every_n_steps, self.bad >= rules.decr_every_n_nan_or_inf
        larger, smaller = self.value * rules.incr_ratio, (self.value * rules.decr_ratio).clamp(min=rules.smallest)
        grown = torch.where(grow & torch.isfinite(larger), larger, self.value)
        self.value = torch.where(shrink, smaller, grown)
        self.good, self.bad = self.good * ~grow, self.bad * ~shrink


class Precision:
    """A policy carried out on a device and over the ranks of `world`.

    name: one of POLICIES. scaling: how fp16 policies scale the loss; the others run at scale 1.
    amp_backend: "native", "auto" (the same), or "apex": an installed apex that still has `amp`, for O0, O1 and O2.
    patience: steps in a row without a usable gradient, at the smallest scale, after which step() gives up.
    Raises PrecisionError (an unknown policy or backend, no apex.amp) or DeviceError (a type that the device lacks).
    """

    def __init__(
        self,
        name: str,
        device: Device,
        world: World = ALONE,
        scaling: LossScaling = LossScaling(),
        amp_backend: str = "auto",
        patience: int = 50,
    ) -> None:
        if name not in POLICIES:
            raise PrecisionError(f"opt_level '{name}': choose from {', '.join(POLICIES)}")
        if amp_backend not in ("auto", "native", "apex"):
            raise PrecisionError(f"amp_backend '{amp_backend}': choose from auto, native, apex")
        self.policy = POLICIES[name]
        if not device.supports(self.policy.compute):
            raise DeviceError(_unsupported(self.policy, device))
        if self.policy.autocast:
            device.autocast(self.policy.autocast)  # where old torch has none it says so here, not at the first step
        self.device, self.world, self.patience = device, world, patience
        if not self.policy.scaled:
            scaling = LossScaling(init_loss_scaling=1.0, use_dynamic_loss_scaling=False)
        self.loss_scale = LossScale(scaling, device.torch)
        self.saturates = (
            self.policy.scaled and device.kind == "npu" and device.describe().get("name") in SATURATING_CHIPS
        )
        self.names: dict[str, torch.Tensor] = {}  # what is optimised, by its parameter's name: optim.optimizer_state
        self._masters: dict[str, nn.Parameter] = {}  # fp32, by the name of the half weight
        self._halves: list[nn.Parameter] = []  # the half weights, in the masters' order
        self._model_params: list[nn.Parameter] = []
        self._steps = 0
        self._apex = _Apex(_import_apex_amp(), self.policy, scaling) if amp_backend == "apex" else None

    @property
    def scale(self) -> float:
        """What the loss is multiplied by now. Reading it waits for the device: read it when logging."""
        return float(self.loss_scale.value)

    @property
    def skipped(self) -> int:
        """Steps skipped so far. Reading it waits for the device: read it when logging."""
        return int(self.loss_scale.skipped)

    def prepare(
        self,
        model: nn.Module,
        make_optimizer: Callable[[list[dict]], torch.optim.Optimizer] | None = None,
        groups: Sequence[dict] = (),
    ) -> torch.optim.Optimizer | None:
        """Casts `model` in place as the policy says, and builds the optimizer over what is really updated.

        groups: parameter groups over the model's own parameters (optim.parameter_groups). make_optimizer gets them
        with fp32 masters in place of half weights where the policy has masters. Without it (inference) the model is
        only cast and None comes back. Call it before DistributedDataParallel wraps the model.
        """
        if make_optimizer is None:
            self._apex = None
        if self._apex is not None:
            optimizer, self.names = self._apex.prepare(model, make_optimizer, groups)
            return optimizer
        masters = _cast_weights_(model, self.policy.weights, self.policy.masters and make_optimizer is not None)
        named = dict(model.named_parameters())
        self._masters = {name: masters[p] for name, p in named.items() if p in masters}
        self._halves = [named[name] for name in self._masters]
        self._model_params = list(named.values())
        if make_optimizer is None:
            return None
        groups = [{**group, "params": [masters.get(p, p) for p in group["params"]]} for group in groups]
        optimizer = make_optimizer(groups)
        optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.names = {name: masters.get(p, p) for name, p in named.items() if id(masters.get(p, p)) in optimised}
        return optimizer

    def autocast(self):
        """The context for the model's forward; the head's loss belongs outside of it."""
        if self._apex is not None or self.policy.autocast is None:
            return nullcontext()
        return self.device.autocast(self.policy.autocast)

    def cast_input(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in the type of half weights; as it is where autocast or apex cast, or nothing has to."""
        if self._apex is not None or self.policy.weights == torch.float32:
            return images
        return images.to(self.policy.weights)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of loss * scale; may be called several times before step(), to accumulate. loss: 0-dim."""
        if self._apex is not None:
            self._apex.backward(loss)
        else:
            (loss * self.loss_scale.value).backward()

    @torch.no_grad()
    def step(
        self,
        optimizer: torch.optim.Optimizer,
        head=None,
        lr: float | None = None,
        max_norm: float | None = None,
        diagnose: Callable[[], str] | None = None,
    ) -> None:
        """One update of backbone and head on every rank, or, where any rank found an inf or nan, of none. Drops .grad.

        head: has found_inf() -> 0-dim tensor and step(lr, inv_scale, found_inf), and works on scaled gradients.
        lr: of the head, None: of the optimizer's first group. max_norm: clips the norm of the backbone's gradient.
        diagnose: called on every rank before giving up, e.g. `lambda: first_non_finite(model, scaled_loss_of_a_batch)`.

        The host does not wait for the device where the optimizer takes found_inf (torch's fused SGD). Plain and
        foreach SGD and NpuFusedSGD do not: for them one number is read a step. Every `patience` steps one more is
        read, and PrecisionError raised where no gradient was usable for so long at the smallest scale.
        """
        if lr is None:
            lr = optimizer.param_groups[0]["lr"]
        if self._apex is not None:
            found_inf = self._apex.step(self.world, self.device.torch, head, lr, max_norm, self.loss_scale)
            self.loss_scale.count(found_inf)
            self._stop_if_stuck(diagnose)
            return
        self._widen_gradients()
        optimised = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        inv_scale = self.loss_scale.value.reciprocal()
        found_inf = unscale_and_check_([p.grad for p in optimised], inv_scale, self.saturates)
        if head is not None:
            found_inf = torch.max(found_inf, head.found_inf().to(found_inf))
        self.world.all_reduce_(found_inf, op="max")
        if max_norm:
            nn.utils.clip_grad_norm_(optimised, max_norm)
        _update_unless(found_inf, optimizer)
        if head is not None:
            head.step(lr, inv_scale, found_inf)
        self._narrow_masters()
        self._drop_gradients(optimizer)
        self.loss_scale.count(found_inf)
        self.loss_scale.adjust(found_inf)
        self._stop_if_stuck(diagnose)

    def model_state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """model.state_dict() in fp32, from the masters where there are any. The tensors are the model's own memory."""
        exact = self._apex.masters(self.names) if self._apex is not None else self._masters
        state = {name: exact.get(name, value).detach() for name, value in model.state_dict().items()}
        return {name: _widened(value) for name, value in state.items()}

    @torch.no_grad()
    def load_model_state(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """What model_state() gave under any policy, into model and masters, in place."""
        model.load_state_dict(state)
        exact = self._apex.masters(self.names) if self._apex is not None else self._masters
        for name, master in exact.items():
            master.copy_(state[name])

    def state_dict(self) -> dict:
        """Plain numbers: the policy's name, the scale and the counters."""
        s = self.loss_scale
        good = self._apex.good_steps() if self._apex is not None else float(s.good)
        return {
            "policy": self.policy.name,
            "dynamic": self.policy.scaled and s.scaling.use_dynamic_loss_scaling,
            "scale": float(s.value),
            "good_steps": good,
            "bad_steps": float(s.bad),
            "skipped": float(s.skipped),
            "stuck": float(s.stuck),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Continue from state_dict() of any policy: the scale is taken over from dynamic to dynamic scaling only."""
        s = self.loss_scale
        self._steps = int(state["steps"])
        s.skipped.fill_(state["skipped"])
        if not (self.policy.scaled and s.scaling.use_dynamic_loss_scaling and state["dynamic"]):
            return
        s.value.fill_(state["scale"])
        s.good.fill_(state["good_steps"])
        s.bad.fill_(state["bad_steps"])
        s.stuck.fill_(state["stuck"])
        if self._apex is not None:
            self._apex.set_scale(state["scale"], state["good_steps"])

    def _widen_gradients(self) -> None:
        """The half gradients as fp32 gradients of the masters, whose .grad keeps its memory: NpuFusedSGD needs that."""
        targets, sources = [], []
        for p, master in zip(self._halves, self._masters.values()):
            if p.grad is None:
                master.grad = None
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
            targets.append(master.grad)
            sources.append(p.grad)
        _copy_(targets, sources)

    def _narrow_masters(self) -> None:
        _copy_([p.detach() for p in self._halves], [master.detach() for master in self._masters.values()])

    def _drop_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if getattr(optimizer, "is_fused_optimizer", False):  # NpuFusedSGD owns its gradients' memory
            optimizer.zero_grad(set_to_none=False)
            own = self._halves
        else:
            own = self._model_params
        for p in own:
            p.grad = None

    def _stop_if_stuck(self, diagnose: Callable[[], str] | None) -> None:
        self._steps += 1
        if self._steps % self.patience or int(self.loss_scale.stuck) < self.patience:
            return
        found = self.world.all_gather_object(diagnose() if diagnose else "")
        first = next((f"; first not finite: {text} on rank {rank}" for rank, text in enumerate(found) if text), "")
        raise PrecisionError(
            f"no usable gradient for {int(self.loss_scale.stuck)} steps at the smallest loss scale "
            f"{self.loss_scale.scaling.smallest:g}{first}: lower the learning rate, look at the data, or choose "
            "--opt_level=O0"
        )


def _cast_weights_(model: nn.Module, dtype: torch.dtype, with_masters: bool) -> dict[nn.Parameter, nn.Parameter]:
    """All but batch norm to `dtype`, in place; {parameter: its fp32 master} where masters are wanted."""
    masters: dict[nn.Parameter, nn.Parameter] = {}
    if dtype == torch.float32:
        return masters
    for module in model.modules():
        if isinstance(module, BATCH_NORM):
            continue
        for p in module.parameters(recurse=False):
            if p.dtype == dtype:  # shared with a module that was before
                continue
            if with_masters:
                masters[p] = nn.Parameter(p.detach().float())  # takes over the memory of the fp32 weight
            p.data = p.data.to(dtype)
            p.grad = None
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))
    return masters


def unscale_and_check_(grads: Sequence[torch.Tensor], inv_scale: torch.Tensor, saturates: bool = False) -> torch.Tensor:
    """grads *= inv_scale in place; 0-dim fp32: 1.0 if any of them was inf or nan, else 0.0. inv_scale: 0-dim fp32.

    saturates: a gradient of LARGEST_FP16 or more, before it is unscaled, counts as an overflow too.
    """
    found_inf = torch.zeros((), device=inv_scale.device)
    if saturates:
        for grad in grads:
            found_inf = torch.max(found_inf, (grad.float().abs().max() >= LARGEST_FP16).float())
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        same = [grad for grad in grads if grad.dtype == dtype]
        if _has_foreach_check(found_inf.device, dtype):
            torch._amp_foreach_non_finite_check_and_unscale_(same, found_inf, inv_scale)
        else:
            for grad in same:
                found_inf = torch.max(found_inf, 1 - torch.isfinite(grad).all().float())
                grad.mul_(inv_scale.to(dtype))
    return found_inf


@functools.cache
def _has_foreach_check(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the operator behind torch.amp.GradScaler, one pass over all gradients, runs there (torch 1.8: no cpu)."""
    try:
        grad = torch.ones(1, device=device, dtype=dtype)
        torch._amp_foreach_non_finite_check_and_unscale_(
            [grad], torch.zeros((), device=device), torch.ones((), device=device)
        )
    except (AttributeError, RuntimeError):
        return False
    return True


def _update_unless(found_inf: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = found_inf  # read by the kernel, as torch.amp.GradScaler hands it over
        optimizer.step()
        del optimizer.found_inf
    elif not float(found_inf):  # waits for the device
        optimizer.step()


def _copy_(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if not targets:
        return
    if hasattr(torch, "_foreach_copy_"):  # torch 2.1; one call where the loop has hundreds
        torch._foreach_copy_(targets, sources)
    else:
        for target, source in zip(targets, sources):
            target.copy_(source)


def _widened(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _unsupported(policy: Policy, device: Device) -> str:
    wanted = str(policy.compute).replace("torch.", "")
    able = [p.name for p in POLICIES.values() if device.supports(p.compute)]
    return (
        f"opt_level {policy.name} computes in {wanted}, which {device} cannot train in with torch {torch.__version__}: "
        f"choose from {', '.join(able)} here, or another device"
    )


def first_non_finite(model: nn.Module, scaled_loss: Callable[[], torch.Tensor]) -> str:
    """The first module whose output, or else whose output's or parameter's gradient, is inf or nan; "" if none is.

    scaled_loss: runs the model on a batch and returns the 0-dim loss, scaled as training scales it. It is called
    once and goes backward once on every rank, whatever is found, so that ranks that exchange gradients stay together.
    """
    found: list[str] = []

    def note(text: str, t: torch.Tensor) -> None:
        if not found and not bool(torch.isfinite(t).all()):
            found.append(text)

    def watch_output(label: str):
        def hook(module, inputs, output):
            for t in output if isinstance(output, (tuple, list)) else [output]:
                note(f"output of {label}", t)
                if t.requires_grad:
                    t.register_hook(lambda grad: note(f"gradient of the output of {label}", grad))

        return hook

    def watch_gradient(name: str):
        return lambda grad: note(f"gradient of {name}", grad)

    handles = []
    for name, module in model.named_modules():
        label = f"{name or 'the network'} ({type(module).__name__})"
        handles.append(module.register_forward_hook(watch_output(label)))
    for name, p in model.named_parameters():
        if p.requires_grad:
            handles.append(p.register_hook(watch_gradient(name)))
    try:
        with torch.enable_grad():
            loss = scaled_loss()
            note("the loss", loss)
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _import_apex_amp():
    """apex.amp, or PrecisionError in one line: NVIDIA's apex has had none since 2025."""
    cure = "install one that has it (NVIDIA's tag 25.05, Ascend's apex), or choose --amp_backend=native"
    try:
        import apex
    except ImportError as error:
        raise PrecisionError(f"amp_backend apex: no apex is installed here ({error}): {cure}") from error
    try:
        from apex import amp
    except ImportError as error:
        version = getattr(apex, "__version__", "")
        raise PrecisionError(f"amp_backend apex: the installed apex {version} has no amp: {cure}") from error
    return amp


class _Apex:
    """The same step with apex.amp, through its documented interface: initialize, scale_loss, master_params, state."""

    def __init__(self, amp, policy: Policy, scaling: LossScaling) -> None:
        if policy.name not in ("O0", "O1", "O2"):
            raise PrecisionError(f"amp_backend apex: it has no policy {policy.name}, only O0, O1, O2")
        self.amp, self.policy, self.scaling = amp, policy, scaling
        self.optimizer: torch.optim.Optimizer | None = None
        self.skips = False  # apex found an overflow on this rank since the last step
        self.scales: set[float] = set()  # of the micro-batches since the last step

    def prepare(self, model, make_optimizer, groups):
        optimizer = make_optimizer([dict(group) for group in groups])
        named = {id(p): name for name, p in model.named_parameters()}
        order = [named[id(p)] for group in optimizer.param_groups for p in group["params"]]
        dynamic = self.scaling.use_dynamic_loss_scaling
        options = {"opt_level": self.policy.name}
        options["loss_scale"] = "dynamic" if dynamic else self.scaling.init_loss_scaling
        if "combine_grad" in inspect.signature(self.amp.initialize).parameters:  # Ascend's apex
            options["combine_grad"] = True
        _, self.optimizer = self.amp.initialize(model, optimizer, **options)
        return self.optimizer, dict(zip(order, self.amp.master_params(self.optimizer)))

    def backward(self, loss: torch.Tensor) -> None:
        self.scales.add(self._scaler()["loss_scale"])
        # Where it finds an overflow, apex puts a stand-in in place of optimizer.step that does nothing once.
        step_before = vars(self.optimizer).get("step")
        with self.amp.scale_loss(loss, self.optimizer) as scaled_loss:
            scaled_loss.backward()
        self.skips |= vars(self.optimizer).get("step") is not step_before

    def step(self, world, device, head, lr, max_norm, loss_scale: LossScale) -> torch.Tensor:
        # apex may change the scale between micro-batches, which the head's sum of scaled gradients does not survive
        bad = self.skips or len(self.scales) > 1
        found_inf = torch.tensor(float(bad), device=device)
        if head is not None:
            found_inf = torch.max(found_inf, head.found_inf().to(found_inf))
        world.all_reduce_(found_inf, op="max")
        if not float(found_inf) and max_norm:
            nn.utils.clip_grad_norm_(list(self.amp.master_params(self.optimizer)), max_norm)
        if not float(found_inf) or self.skips:
            self.optimizer.step()
        if head is not None:
            head.step(lr, torch.tensor(1.0 / max(self.scales), device=device), found_inf)
        self.optimizer.zero_grad()
        self.skips, self.scales = False, set()
        loss_scale.value.fill_(self._scaler()["loss_scale"])
        if float(found_inf) and world.size > 1:
            # only the ranks that met the overflow have lowered their scale
            self.set_scale(float(world.all_reduce_(loss_scale.value, op="min")), 0)
        return found_inf

    def masters(self, names: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What apex updates, by name: under O2 its fp32 masters, else the parameters themselves."""
        return dict(zip(names, self.amp.master_params(self.optimizer)))

    def good_steps(self) -> float:
        return float(self._scaler()["unskipped"])

    def set_scale(self, scale: float, good_steps: float) -> None:
        self.amp.load_state_dict({"loss_scaler0": {"loss_scale": scale, "unskipped": int(good_steps)}})

    def _scaler(self) -> dict:
        return self.amp.state_dict()["loss_scaler0"]
