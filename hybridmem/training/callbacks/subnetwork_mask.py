"""Training a small subnetwork alone (after arXiv 2505.11711)."""

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
    """Trains the weights that a mask names, and leaves all others as they were, to the bit.

    The others' gradients are zero before they are counted into the norm, and after each optimiser step they get the
    value back that they had when training started: weight decay, momentum and whitened updates would move them. That
    takes a copy of the model's weights.

    Args:
        mask: a safetensors file, as `hybridmem subnetwork --save_mask` writes it: for each parameter a bool tensor of
            its shape, true where it is trained, under the name that it has in the model's own state dict.

    Raises:
        ValueError: a file that cannot be read; before the first batch, masks that are not this model's, that train
            nothing, or parameters that are sharded over processes.
    """

    def __init__(self, mask: str):
        self.mask = StoredWeights(mask)
        self._handles: list[RemovableHandle] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the mask against the model, and hold what it does not name."""
        parameters = trained_parameters(pl_module.model)
        check_mask(self.mask, pl_module.model, parameters)
        # Of a resumed run these are the first run's values: nothing has moved them.
        held = [Held(parameter, self.mask[name].to(parameter.device)) for name, parameter in parameters.items()]
        if all(one.everywhere for one in held):
            raise ValueError(f"mask={self.mask} names no weight: nothing would be trained")
        self._handles = [one.parameter.register_hook(one.masked_gradient) for one in held]
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(partial(_put_back, held)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go."""
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class Held:
    """A parameter of which some entries keep their values."""

    def __init__(self, parameter: nn.Parameter, trained: Bool[Tensor, "..."]):
        self.parameter, self.kept = parameter, ~trained
        self.values = parameter.detach().clone()

    @property
    def everywhere(self) -> bool:
        """Whether all entries are held."""
        return bool(self.kept.all())

    def masked_gradient(self, gradient: Tensor) -> Tensor:
        """Zero where the parameter is held."""
        return gradient.masked_fill(self.kept, 0)

    @torch.no_grad()
    def put_back(self) -> None:
        """The held values."""
        self.parameter.copy_(torch.where(self.kept, self.values, self.parameter))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_mask(mask: StoredWeights, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise a ValueError that says how a mask is not one of a model's parameters."""
    sharded = [name for name, parameter in parameters.items() if isinstance(parameter, DTensor)]
    if sharded:
        raise ValueError(f"SubnetworkMask needs whole parameters on each process, and {sharded[0]} is sharded")
    lacking = [name for name in parameters if name not in mask]
    unknown = sorted(mask.keys() - model.state_dict().keys())  # buffers and second names of tied weights may be there
    if lacking or unknown:
        raise ValueError(
            f"mask={mask} is of another model: it lacks {listed(lacking) or 'nothing'}, and the model lacks "
            f"{listed(unknown) or 'nothing'}"
        )
    shapes = shapes_of(parameters)
    for name in parameters:
        if mask.dtypes[name] != "BOOL":
            raise ValueError(f"mask={mask} has {name} in {mask.dtypes[name]}: a mask is bool (hybridmem subnetwork)")
        if mask.shapes[name] != shapes[name]:
            raise ValueError(
                f"mask={mask} is of another model: {name} is {list(mask.shapes[name])}, here {list(shapes[name])}"
            )


def _put_back(held: list[Held], *_: Any) -> None:
    for one in held:
        one.put_back()
