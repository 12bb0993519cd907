"""A guard against numbers that are none: it names where they came up, and skips the step or stops."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from hybridmem.checks import at_least, one_of
from hybridmem.rl.rollouts.non_finite import named_layers
from hybridmem.training.errors import StoppedError
from hybridmem.training.non_finite import non_finite_remedy

Action = Literal["stop", "skip"]


class NonFiniteGuard(L.Callback):
    """Looks whether loss and gradients of every step are finite, in pretraining and in reinforcement learning.

    What is not is named with its optimiser step: the first layer whose output is not finite, or the parameter whose
    gradient the backward spoilt first, which is the last of those that are spoilt. `stop` ends the run before the
    weights change. `skip` leaves weights and optimiser as they are, goes on with the next batch, and logs as
    nonfinite/skipped how many steps that was, through all resumes. Memory carried from row to row begins anew.

    With precision 16 the gradients are left to the loss scaling, which overflows as a matter of course.

    Args:
        action: `stop` or `skip`.
        patience: steps that are skipped one after another before the run is stopped all the same.

    Raises:
        ValueError: settings that cannot work.
        StoppedError: while training, when the run is stopped.
    """

    def __init__(self, action: Action = "stop", patience: int = 10):
        one_of(get_args(Action), action=action)
        at_least(1, patience=patience)
        self.action, self.patience = action, patience
        self.skipped = 0
        self.in_a_row = 0
        self.found: str | None = None  # what is not finite in the step under way
        self.outputs: dict[str, Tensor] = {}  # whether each layer's output was finite, asked of the device if needed
        self.hooks: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Listen to the layers."""
        layers = named_layers(pl_module.model)
        self.hooks = [module.register_forward_hook(self._listener(name)) for name, module in layers]

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stop listening."""
        for hook in self.hooks:
            hook.remove()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stop listening."""
        self.on_fit_end(trainer, pl_module)

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Look at the loss, and if it is not finite at what the layers gave."""
        if self.found is None and not torch.isfinite(loss).all():
            spoilt = next((name for name, finite in self.outputs.items() if not finite), None)
            source = "the layers' outputs are finite" if spoilt is None else f"first in the output of {spoilt}"
            self.found = f"the loss is {loss.detach().mean().item()} ({source})"

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Look at the gradients."""
        self.outputs.clear()  # of layers that the backward computed again
        if self.found is None and getattr(trainer.precision_plugin, "scaler", None) is None:
            spoilt = _spoilt_gradient(pl_module)
            if spoilt is not None:
                self.found = f"the gradient of {spoilt} is not finite"

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Keep the optimiser from steps that would spoil the weights."""
        found, self.found = self.found, None
        spoilt = found is not None
        if trainer.world_size > 1:  # the processes' losses differ
            spoilt = trainer.strategy.reduce_boolean_decision(spoilt, all=False)
        if not spoilt:
            self.in_a_row = 0
            return
        what = f"{found or 'another process has a loss that is not finite'} at optimiser step {trainer.global_step}"
        self.in_a_row += 1
        if self.action == "stop" or self.in_a_row > self.patience:
            again = f"after {self.patience} skipped ones" if self.action == "skip" else "and nothing was changed by it"
            skip = "" if self.action == "skip" else ", or set NonFiniteGuard's action to skip"
            raise StoppedError(f"{what}, {again}: {non_finite_remedy(trainer, skip)}")
        self.skipped += 1
        rank_zero_warn(f"{what}: the step is skipped, the {self.skipped}. of this run")
        optimizer.zero_grad(set_to_none=True)  # optimisers pass by parameters without gradients
        if getattr(pl_module, "carried", None) is not None:
            pl_module.carried = None  # it has read the batch too, and would spoil the next one
        pl_module.log("nonfinite/skipped", float(self.skipped))

    def _listener(self, name: str) -> Callable[..., None]:
        def listen(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if torch.is_grad_enabled() and isinstance(hidden, Tensor):
                finite = torch.isfinite(hidden.detach()).all()
                self.outputs[name] = finite & self.outputs[name] if name in self.outputs else finite

        return listen


def _spoilt_gradient(module: nn.Module) -> str | None:
    """The last parameter whose gradient is not finite: the backward comes from the end."""
    grads = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    if not grads or torch.isfinite(torch.stack([norm.float() for norm in _norms(grads)]).sum()):
        return None
    return next((name for name, grad in reversed(grads) if not _is_finite(grad)), None)


def _norms(grads: list[tuple[str, Tensor]]) -> list[Tensor]:
    return list(torch._foreach_norm([_local(grad) for _, grad in grads]))


def _is_finite(grad: Tensor) -> bool:
    return bool(torch.isfinite(_local(grad)).all())


def _local(grad: Tensor) -> Tensor:
    """This process's part of a gradient that is spread over several."""
    return grad.to_local() if hasattr(grad, "to_local") else grad
