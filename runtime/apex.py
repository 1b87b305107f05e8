"""A Precision carried out by apex.amp, through its documented interface: initialize, scale_loss, master_params, state.

Ascend's servers often come with an apex of their own; NVIDIA's has had no amp since 2025.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import torch
from torch import nn

from runtime.errors import PrecisionError
from runtime.precision import Precision


class ApexPrecision(Precision):
    """As Precision, for the policies O0, O1 and O2. Without an optimizer (inference) it is Precision itself."""

    def __init__(self, name, device, *options) -> None:
        super().__init__(name, device, *options)
        self.amp = _import_amp()
        if name not in ("O0", "O1", "O2"):
            raise PrecisionError(f"amp_backend apex: it has no policy {name}, only O0, O1, O2")
        self.optimizer: torch.optim.Optimizer | None = None
        self.skips = False  # apex found an overflow on this rank since the last step
        self.scales: set[float] = set()  # of the micro-batches since the last step

    def prepare(self, model, make_optimizer=None, groups=()):
        if make_optimizer is None:
            return super().prepare(model)
        optimizer = make_optimizer([dict(group) for group in groups])
        named = {id(p): name for name, p in model.named_parameters()}
        order = [named[id(p)] for group in optimizer.param_groups for p in group["params"]]
        scaling = self.loss_scale.scaling
        options = {"opt_level": self.policy.name}
        options["loss_scale"] = "dynamic" if scaling.use_dynamic_loss_scaling else scaling.init_loss_scaling
        if "combine_grad" in inspect.signature(self.amp.initialize).parameters:  # Ascend's apex
            options["combine_grad"] = True
        _, self.optimizer = self.amp.initialize(model, optimizer, **options)
        self.names = dict(zip(order, self.amp.master_params(self.optimizer)))
        return self.optimizer

    def autocast(self):
        return super().autocast() if self.optimizer is None else nullcontext()

    def cast_input(self, images):
        return super().cast_input(images) if self.optimizer is None else images

    def backward(self, loss: torch.Tensor) -> None:
        self.divergence.see(loss)
        self.scales.add(self._scaler()["loss_scale"])
        # Where it finds an overflow, apex puts a stand-in in place of optimizer.step that does nothing once.
        step_before = vars(self.optimizer).get("step")
        with self.amp.scale_loss(loss, self.optimizer) as scaled_loss:
            scaled_loss.backward()
        self.skips |= vars(self.optimizer).get("step") is not step_before

    @torch.no_grad()
    def step(self, optimizer, head=None, lr=None, max_norm=None, diagnose=None) -> None:
        if lr is None:
            lr = optimizer.param_groups[0]["lr"]
        # apex may change the scale between micro-batches, which the head's sum of scaled gradients does not survive
        bad = self.skips or len(self.scales) > 1
        found_inf = torch.tensor(float(bad), device=self.device.torch)
        if head is not None:
            found_inf = torch.max(found_inf, head.found_inf().to(found_inf))
        found_inf = self.divergence.agree(found_inf)
        if not float(found_inf) and max_norm:
            nn.utils.clip_grad_norm_(list(self.amp.master_params(self.optimizer)), max_norm)
        if not float(found_inf) or self.skips:
            self.optimizer.step()
        if head is not None:
            head.step(lr, torch.tensor(1.0 / max(self.scales), device=self.device.torch), found_inf)
        self.optimizer.zero_grad()
        self.skips, self.scales = False, set()
        scale = self.loss_scale.value.fill_(self._scaler()["loss_scale"])
        if float(found_inf) and self.world.size > 1:
            # only the ranks that met the overflow have lowered their scale
            self._set_scale(float(self.world.all_reduce_(scale, op="min")), 0)
        self.divergence.count(found_inf, self.loss_scale.at_smallest())
        self.divergence.check(diagnose)

    def state_dict(self) -> dict:
        state = super().state_dict()
        return {**state, "good_steps": float(self._scaler()["unskipped"])} if self.optimizer is not None else state

    def load_state_dict(self, state) -> None:
        super().load_state_dict(state)
        if self.policy.scaled and self.loss_scale.scaling.use_dynamic_loss_scaling and state["dynamic"]:
            self._set_scale(state["scale"], state["good_steps"])

    def _exact(self):
        """Under O2 apex's fp32 masters, else the parameters themselves."""
        return self.names

    def _set_scale(self, scale: float, good_steps: float) -> None:
        self.amp.load_state_dict({"loss_scaler0": {"loss_scale": scale, "unskipped": int(good_steps)}})

    def _scaler(self) -> dict:
        return self.amp.state_dict()["loss_scaler0"]


def _import_amp():
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
