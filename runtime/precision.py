"""Precision policies O0, O1, O2, fp16, bf16, bf16_master: what a step computes in, and when it is skipped.

One step under every policy (Precision.backward and Precision.step):
loss * scale -> backward -> gradients to fp32 and back to their true size -> one inf or nan anywhere, loss and head's
gradients included? -> the ranks agree (maximum) -> clip -> every rank updates, or every rank skips
-> fp32 masters are copied into the half weights -> the scale follows PLSC's six parameters (runtime.loss_scale).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from runtime.device import Device, owns_gradients
from runtime.dist import ALONE, World
from runtime.divergence import Divergence
from runtime.errors import DeviceError, PrecisionError
from runtime.loss_scale import DYNAMIC, LossScale, LossScaling

BATCH_NORM = nn.modules.batchnorm._BatchNorm  # the base class has no public name


@dataclass(frozen=True)
class Policy:
    """What a policy keeps in which type. weights: of all layers but batch norm, which stays fp32."""

    name: str
    meaning: str
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    masters: bool = False  # fp32 copies of the half weights, which the optimizer updates
    rounded: bool = False  # the copies take over what the half weights hold, and are exact for one update only
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
        # The update itself is fp32: fp16 gradients near 1e-8, divided by the scale in fp16, would become zero.
        Policy(
            "fp16",
            "fp16 weights (arcface_paddle's), fp32 update",
            weights=torch.float16,
            masters=True,
            rounded=True,
            scaled=True,
        ),
        Policy("bf16", "fp32 weights, autocast to bfloat16", autocast=torch.bfloat16),
        Policy("bf16_master", "bfloat16 weights with fp32 masters", weights=torch.bfloat16, masters=True),
    )
}


class Precision:
    """A policy carried out on a device and over the ranks of `world`.

    name: one of POLICIES. scaling: how fp16 policies scale the loss; the others run at scale 1.
    patience: steps in a row that were not finite after which step() gives up (runtime.divergence).
    Raises PrecisionError (an unknown policy) or DeviceError (a type that the device lacks). make_precision also knows
    apex.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        world: World = ALONE,
        scaling: LossScaling = DYNAMIC,
        patience: int = 20,
    ) -> None:
        if name not in POLICIES:
            raise PrecisionError(f"opt_level '{name}': choose from {', '.join(POLICIES)}")
        self.policy = POLICIES[name]
        if not device.supports(self.policy.compute):
            raise DeviceError(_unsupported(self.policy, device))
        if self.policy.autocast:
            device.autocast(self.policy.autocast)  # where old torch has none it says so here, not at the first step
        self.device, self.world = device, world
        if not self.policy.scaled:
            scaling = LossScaling(init_loss_scaling=1.0, use_dynamic_loss_scaling=False)
        self.loss_scale = LossScale(scaling, device.torch)
        self.divergence = Divergence(device.torch, world, patience)
        self._begun = False  # a backward() since the last step
        for dtype in {torch.float32, self.policy.weights}:  # tried out now: later it would drop a chip's overflow flag
            _has_foreach_check(device.torch, dtype)
        self.names: dict[str, torch.Tensor] = {}  # what is optimised, by its parameter's name: optim.optimizer_state
        self._masters: dict[str, nn.Parameter] = {}  # fp32, by the name of the half weight
        self._halves: list[nn.Parameter] = []  # the half weights, in the masters' order
        self._model_params: list[nn.Parameter] = []

    @property
    def scale(self) -> float:
        """What the loss is multiplied by now. Reading it waits for the device: read it when logging."""
        return float(self.loss_scale.value)

    @property
    def skipped(self) -> int:
        """Steps skipped so far. Reading it waits for the device: read it when logging."""
        return int(self.divergence.skipped)

    def finite(self, also: Iterable[torch.Tensor] = ()) -> bool:
        """Whether the training may be saved: the newest losses, gradients, what is optimised and the tensors `also`
        hold numbers alone. Every rank must call it, and all get the same answer; it waits for the device."""
        return self.divergence.finite([*self.names.values(), *also])

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
        masters = _cast_weights_(model, self.policy.weights, self.policy.masters and make_optimizer is not None)
        named = dict(model.named_parameters())
        self._masters = {name: masters[p] for name, p in named.items() if p in masters}
        self._halves = [named[name] for name in self._masters]
        self._model_params = list(named.values())
        self._forget()
        if make_optimizer is None:
            return None
        groups = [{**group, "params": [masters.get(p, p) for p in group["params"]]} for group in groups]
        optimizer = make_optimizer(groups)
        optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.names = {name: masters.get(p, p) for name, p in named.items() if id(masters.get(p, p)) in optimised}
        return optimizer

    def autocast(self):
        """The context for the model's forward; the head's loss belongs outside of it."""
        if not self._begun:  # what verification or the last update overflowed does not count against this step
            self.device.clear_overflow()
        if self.policy.autocast is None:
            return nullcontext()
        return self.device.autocast(self.policy.autocast)

    def cast_input(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in the type of half weights; as it is where autocast casts or nothing has to."""
        if self.policy.weights == torch.float32:
            return images
        return images.to(self.policy.weights)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of loss * scale; may be called several times before step(), to accumulate. loss: 0-dim."""
        self._begun = True
        self.divergence.see(loss)
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
        read, and PrecisionError raised where loss or gradients were not finite for so long.
        """
        if lr is None:
            lr = optimizer.param_groups[0]["lr"]
        self._widen_gradients()
        optimised = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        inv_scale = self.loss_scale.value.reciprocal()
        found_inf = unscale_and_check_([p.grad for p in optimised], inv_scale)
        if head is not None:
            found_inf = torch.max(found_inf, head.found_inf().to(found_inf))
        found_inf = self.divergence.agree(found_inf)
        if max_norm:
            nn.utils.clip_grad_norm_(optimised, max_norm)
        _update_unless(found_inf, optimizer)
        if head is not None:
            head.step(lr, inv_scale, found_inf)
        self._narrow_masters()
        self._drop_gradients(optimizer)
        self.divergence.count(found_inf, self.loss_scale.at_smallest())
        self.loss_scale.adjust(found_inf)
        self._begun = False
        self.divergence.check(diagnose)

    def model_state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """model.state_dict() in fp32, from the masters where there are any. The tensors are the model's own memory.

        It is the one that the model gave, with what it says beside its tensors, such as the channel order."""
        exact, state = self._exact(), model.state_dict()
        for name, value in state.items():
            state[name] = _widened(exact.get(name, value).detach())
        return state

    @torch.no_grad()
    def load_model_state(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """What model_state() gave under any policy, into model and masters, in place."""
        model.load_state_dict(state)
        for name, master in self._exact().items():
            master.copy_(state[name])
        self._forget()

    def state_dict(self) -> dict:
        """Plain numbers: the policy's name, the scale and the counters."""
        s = self.loss_scale
        return {
            "policy": self.policy.name,
            "dynamic": self.policy.scaled and s.scaling.use_dynamic_loss_scaling,
            "scale": float(s.value),
            "good_steps": float(s.good),
            "bad_steps": float(s.bad),
            **self.divergence.state_dict(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Continue from state_dict() of any policy: the scale is taken over from dynamic to dynamic scaling only."""
        s = self.loss_scale
        self.divergence.load_state_dict(state)
        if not (self.policy.scaled and s.scaling.use_dynamic_loss_scaling and state["dynamic"]):
            return
        s.value.fill_(state["scale"])
        s.good.fill_(state["good_steps"])
        s.bad.fill_(state["bad_steps"])

    def _exact(self) -> dict[str, torch.Tensor]:
        """The fp32 tensors that are updated in place of half weights, by the weights' names."""
        return self._masters

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
        self._forget()

    def _forget(self) -> None:
        """Masters of a policy that keeps half weights only hold no more than those."""
        if self.policy.rounded:
            _copy_([p.detach() for p in self._masters.values()], [p.detach() for p in self._halves])

    def _drop_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if owns_gradients(optimizer):
            optimizer.zero_grad(set_to_none=False)
            own = self._halves
        else:
            own = self._model_params
        for p in own:
            p.grad = None


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


def unscale_and_check_(grads: Sequence[torch.Tensor], inv_scale: torch.Tensor) -> torch.Tensor:
    """grads *= inv_scale in place; 0-dim fp32: 1.0 if any of them was inf or nan, else 0.0. inv_scale: 0-dim fp32.

    On chips that saturate (Device.saturates) torch_npu's operator reads the chip's flag, and leaves gradients scaled
    where it is set: 1.0 then means that anything since Device.clear_overflow() overflowed.
    """
    found_inf = torch.zeros((), device=inv_scale.device)
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        same = [grad for grad in grads if grad.dtype == dtype]
        if _has_foreach_check(found_inf.device, dtype):
            torch._amp_foreach_non_finite_check_and_unscale_(same, found_inf, inv_scale)
        else:
            for grad in same:
                found_inf = torch.max(found_inf, 1 - torch.isfinite(grad).all().float())
                grad.mul_(inv_scale.to(dtype))
    return found_inf.clamp(max=1.0)  # some operators add to it


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


def make_precision(
    name: str,
    device: Device,
    world: World = ALONE,
    scaling: LossScaling = DYNAMIC,
    amp_backend: str = "auto",
    patience: int = 20,
) -> Precision:
    """A Precision of ours ("native", "auto"), or one that an installed apex carries out ("apex"; O0, O1 and O2 only).

    Raises PrecisionError for an unknown policy or backend and where no apex has amp, else as Precision."""
    if amp_backend not in ("auto", "native", "apex"):
        raise PrecisionError(f"amp_backend '{amp_backend}': choose from auto, native, apex")
    if amp_backend == "apex":
        from runtime.apex import ApexPrecision

        return ApexPrecision(name, device, world, scaling, patience)
    return Precision(name, device, world, scaling, patience)
