"""Non-finite logits in a rollout, and the layer that causes them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


class NonFiniteLogits(ArithmeticError):
    """Error for logits with NaN or inf, which define no distribution to sample from."""


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and module of a transformers model's embeddings, decoder layers and head."""
    ends = [getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings")]
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) or any(module is end for end in ends):
            yield name, module


def first_non_finite_layer(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Rerun a model; return the name of the first layer with a non-finite output, or None."""
    found: list[str] = []

    def listener(name: str) -> Callable[[nn.Module, object, object], None]:
        def listen(_: nn.Module, __: object, output: object) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and not torch.isfinite(hidden).all():
                found.append(name)

        return listen

    hooks = [module.register_forward_hook(listener(name)) for name, module in named_layers(model)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
