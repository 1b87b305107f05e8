"""When to give up: a run whose loss or gradients are not finite for long does not recover by itself.

Steps that were not finite are counted on the device, so that no step waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from runtime.dist import ALONE, World
from runtime.errors import PrecisionError

# A single bad gradient is skipped and forgotten; so many in a row mean that the weights are past saving.
FEW = 3
CURE = (
    "try a lower --lr, a longer --warmup_epochs, --clip_grad_norm=5, or for fp16 a smaller --loss_scale, "
    "--opt_level=bf16 or O0; and look at the data"
)


class Divergence:
    """Counts steps in a row that nothing but other settings could have saved.

    patience: steps in a row after which check() gives up; it asks the device every so many steps.
    """

    def __init__(self, device: torch.device, world: World = ALONE, patience: int = 20) -> None:
        self.world, self.patience = world, patience
        self.steps = 0
        self.skipped, self.hopeless, self.bad_losses = (torch.zeros((), device=device) for _ in range(3))
        self._loss = torch.zeros((), device=device)  # 1.0: a loss since the last step was inf or nan

    def see(self, loss: torch.Tensor) -> None:
        """A loss of this rank, before the step that it belongs to."""
        self._loss = torch.max(self._loss, 1 - torch.isfinite(loss.detach()).all().float())

    def agree(self, found_inf: torch.Tensor) -> torch.Tensor:
        """1.0 where a gradient or a loss of any rank was not finite, the same on all of them. found_inf: 0-dim."""
        both_2 = self.world.all_reduce_(torch.stack([torch.max(found_inf, self._loss), self._loss]), op="max")
        found_inf, self._loss = both_2.unbind()
        return found_inf

    def count(self, found_inf: torch.Tensor, at_smallest: torch.Tensor) -> None:
        """After a step. at_smallest: 1.0 where a smaller loss scale could not have saved it."""
        self.steps += 1
        self.skipped = self.skipped + found_inf
        self.hopeless = (self.hopeless + at_smallest) * found_inf
        self.bad_losses = (self.bad_losses + 1) * self._loss
        self._loss = torch.zeros_like(self._loss)

    def finite(self, tensors: Iterable[torch.Tensor] = ()) -> bool:
        """Whether what was trained may be kept: the last loss was finite, FEW steps in a row were not skipped in vain,
        and `tensors` (of any rank) hold numbers alone. Waits for the device; every rank must call it."""
        bad = [self.bad_losses > 0, self.hopeless >= FEW]
        bad += [~torch.isfinite(t.detach()).all() for t in tensors]
        return not bool(self.world.all_reduce_(torch.stack(bad).any().float(), op="max"))

    def check(self, diagnose: Callable[[], str] | None = None, at_end: bool = False) -> None:
        """Raises PrecisionError, on every rank, where loss or gradients were not finite for `patience` steps in a row,
        or, `at_end` of a run, FEW.

        diagnose: called on every rank before giving up, e.g. `lambda: first_non_finite(model, scaled_loss_of_a_batch)`.
        """
        if self.steps % self.patience and not at_end:
            return
        limit = FEW if at_end else self.patience
        steps = int(torch.max(self.hopeless, self.bad_losses))
        if steps < limit:
            return
        found = self.world.all_gather_object(diagnose() if diagnose else "")
        first = next((f"; first not finite: {text} on rank {rank}" for rank, text in enumerate(found) if text), "")
        what = "loss" if int(self.bad_losses) == steps else "gradients"
        raise PrecisionError(f"{what} not finite for the last {steps} of {self.steps} steps{first}: {CURE}")

    def state_dict(self) -> dict:
        return {"skipped": float(self.skipped), "stuck": float(self.hopeless), "steps": self.steps}

    def load_state_dict(self, state) -> None:
        self.steps = int(state["steps"])
        self.skipped.fill_(state["skipped"])
        self.hopeless.fill_(state["stuck"])


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
