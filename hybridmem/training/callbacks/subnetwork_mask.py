"""Training of a small subnetwork (after arXiv 2505.11711)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from hybridmem.metrics.weights import StoredWeights, listed, shapes_of


class SubnetworkMask(L.Callback):
    """Callback that trains only the weights in a mask, and keeps all others bit-identical.

    Gradients outside the mask are zeroed before they enter the gradient norm. After each optimiser step, the weights
    outside the mask are reset to their initial values, because weight decay, momentum and whitened updates would move
    them. The reset needs a copy of the model's weights.

    Args:
        mask: safetensors file from `hybridmem subnetwork --save_mask`. It holds a bool tensor for each parameter, under
            the parameter's name in the model's state dict, which is True for trained weights.

    Raises:
        ValueError: the file is unreadable, or, before the first batch, the mask belongs to another model, the mask is
            empty or parameters are sharded.
    """

    def __init__(self, mask: str):
        self.mask = StoredWeights(mask)
        self._handles: list[RemovableHandle] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the mask against the model, and hold the weights outside it."""
        parameters = trained_parameters(pl_module.model)
        check_mask(self.mask, pl_module.model, parameters)
        # In a resumed run, the held weights still have their values from the first start.
        held = [Held(parameter, self.mask[name].to(parameter.device)) for name, parameter in parameters.items()]
        if all(one.everywhere for one in held):
            raise ValueError(f"mask={self.mask} selects no weight, so nothing would be trained; choose another mask")
        self._handles = [one.parameter.register_hook(one.masked_gradient) for one in held]
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(partial(_put_back, held)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the hooks."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class Held:
    """Parameter with some entries held at their initial values."""

    def __init__(self, parameter: nn.Parameter, trained: Bool[Tensor, "..."]):
        self.parameter, self.kept = parameter, ~trained
        self.values = parameter.detach().clone()

    @property
    def everywhere(self) -> bool:
        """True if all entries are held."""
        return bool(self.kept.all())

    def masked_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient with held entries set to zero."""
        return gradient.masked_fill(self.kept, 0)

    @torch.no_grad()
    def put_back(self) -> None:
        """Reset the held entries."""
        self.parameter.copy_(torch.where(self.kept, self.values, self.parameter))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name, with tied parameters once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_mask(mask: StoredWeights, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise a ValueError if a mask does not match the model's parameters."""
    sharded = [name for name, parameter in parameters.items() if isinstance(parameter, DTensor)]
    if sharded:
        raise ValueError(
            f"SubnetworkMask needs whole parameters, but {sharded[0]} is sharded; set trainer.strategy to auto or ddp"
        )
    lacking = [name for name in parameters if name not in mask]
    unknown = sorted(mask.keys() - model.state_dict().keys())  # buffers and further names of tied weights are allowed
    if lacking or unknown:
        raise ValueError(
            f"mask={mask} belongs to another model: the mask lacks {listed(lacking) or 'nothing'}, the model lacks "
            f"{listed(unknown) or 'nothing'}; choose another mask"
        )
    shapes = shapes_of(parameters)
    for name in parameters:
        if mask.dtypes[name] != "BOOL":
            raise ValueError(
                f"mask={mask} has dtype {mask.dtypes[name]} for {name}; use a bool mask (hybridmem subnetwork)"
            )
        if mask.shapes[name] != shapes[name]:
            raise ValueError(
                f"mask={mask} belongs to another model: {name} has shape {list(mask.shapes[name])} there and "
                f"{list(shapes[name])} here; choose another mask"
            )


def _put_back(held: list[Held], *_: Any) -> None:
    for one in held:
        one.put_back()
