"""Guard against NaN and inf that names their origin, then skips the step or stops the run."""

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
    """Callback that checks loss and gradients of every step for NaN and inf, in pretraining and RL.

    It reports the optimiser step with the first layer whose output is non-finite, or with the first parameter in
    backward order whose gradient is. `stop` ends the run before the weights change. `skip` leaves weights and optimiser
    unchanged, continues with the next batch and logs the number of skipped steps, across restarts, as
    nonfinite/skipped. Memory carried from row to row is reset.

    With precision 16, gradients are not checked, because loss scaling handles their overflows.

    Args:
        action: `stop` or `skip`.
        patience: consecutive skipped steps after which the run stops anyway.

    Raises:
        ValueError: a setting is invalid.
        StoppedError: during training, to stop the run.
    """

    def __init__(self, action: Action = "stop", patience: int = 10):
        one_of(get_args(Action), action=action)
        at_least(1, patience=patience)
        self.action, self.patience = action, patience
        self.skipped = 0
        self.in_a_row = 0
        self.found: str | None = None  # description of the current step's non-finite values
        self.outputs: dict[str, Tensor] = {}  # True for layers with finite outputs; kept on the device
        self.hooks: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the number of skipped steps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of skipped steps."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Register hooks on the layers."""
        layers = named_layers(pl_module.model)
        self.hooks = [module.register_forward_hook(self._listener(name)) for name, module in layers]

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks."""
        self.on_fit_end(trainer, pl_module)

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Check the loss; if it is non-finite, find the first layer with non-finite outputs."""
        if self.found is None and not torch.isfinite(loss).all():
            spoilt = next((name for name, finite in self.outputs.items() if not finite), None)
            source = "all layers' outputs are finite" if spoilt is None else f"first in the output of {spoilt}"
            self.found = f"the loss is {loss.detach().mean().item()} ({source})"

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check the gradients."""
        self.outputs.clear()  # outputs that activation checkpointing recomputed in the backward pass
        if self.found is None and getattr(trainer.precision_plugin, "scaler", None) is None:
            spoilt = _spoilt_gradient(pl_module)
            if spoilt is not None:
                self.found = f"the gradient of {spoilt} is not finite"

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Skip the step or stop the run if the loss or a gradient is non-finite."""
        found, self.found = self.found, None
        spoilt = found is not None
        if trainer.world_size > 1:  # losses differ between ranks
            spoilt = trainer.strategy.reduce_boolean_decision(spoilt, all=False)
        if not spoilt:
            self.in_a_row = 0
            return
        what = f"{found or 'another process has a loss that is not finite'} at optimiser step {trainer.global_step}"
        self.in_a_row += 1
        if self.action == "stop" or self.in_a_row > self.patience:
            again = f"after {self.patience} skipped steps" if self.action == "skip" else "before any weight changed"
            skip = "" if self.action == "skip" else ", or set NonFiniteGuard's action to skip"
            raise StoppedError(f"{what}, {again}: {non_finite_remedy(trainer, skip)}")
        self.skipped += 1
        rank_zero_warn(f"{what}; skipped the step ({self.skipped} skipped in this run)")
        optimizer.zero_grad(set_to_none=True)  # optimisers ignore parameters without gradients
        if getattr(pl_module, "carried", None) is not None:
            pl_module.carried = None  # the carried state has read the batch and would spread its NaN or inf
        pl_module.log("nonfinite/skipped", float(self.skipped))

    def _listener(self, name: str) -> Callable[..., None]:
        def listen(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if torch.is_grad_enabled() and isinstance(hidden, Tensor):
                finite = torch.isfinite(hidden.detach()).all()
                self.outputs[name] = finite & self.outputs[name] if name in self.outputs else finite

        return listen


def _spoilt_gradient(module: nn.Module) -> str | None:
    """Return the last parameter with a non-finite gradient, which is the first in backward order, or None."""
    grads = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    if not grads or torch.isfinite(torch.stack([norm.float() for norm in _norms(grads)]).sum()):
        return None
    return next((name for name, grad in reversed(grads) if not _is_finite(grad)), None)


def _norms(grads: list[tuple[str, Tensor]]) -> list[Tensor]:
    return list(torch._foreach_norm([_local(grad) for _, grad in grads]))


def _is_finite(grad: Tensor) -> bool:
    return bool(torch.isfinite(_local(grad)).all())


def _local(grad: Tensor) -> Tensor:
    """Return this rank's shard of a gradient."""
    return grad.to_local() if hasattr(grad, "to_local") else grad
