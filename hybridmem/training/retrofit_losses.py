"""Retrofit losses: regression of each memory head on full attention, and KL to the base model."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hybridmem.metrics.bits import document_positions
from hybridmem.model.heads import HeadMixer
from hybridmem.model.memory import pick
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.model.sequence import PADDING, HeadChoice

Batch = dict[str, Tensor]
KL_TOKENS = 1024  # tokens whose logits are in memory at once


class Regression(NamedTuple):
    """Relative errors of heads, and gradients of their mean."""

    errors: Float[Tensor, " heads"]  # all memory heads of all layers
    gradients: dict[nn.Parameter, Tensor]


def every_source(model: HybridMemForCausalLM, source: str) -> list[list[str]]:
    """Return a head_sources table with one source for all heads."""
    config = model.config
    return [[source] * config.num_key_value_heads for _ in range(config.num_hidden_layers)]


def beyond_window(document_ids: Int[Tensor, "batch time"], reach: int) -> Bool[Tensor, "batch time"]:
    """Return a mask of tokens with at least `reach` earlier tokens in their document, beyond window and sinks."""
    return (document_positions(document_ids) >= reach) & (document_ids != PADDING)


def read(
    model: HybridMemForCausalLM, batch: Batch, sources: list[list[str]] | None
) -> Float[Tensor, "batch time hidden"]:
    """Return the last hidden states, with `sources` overriding the configuration's head sources."""
    with model.head_sources(sources):
        return model.model(
            batch["input_ids"], document_ids=batch.get("document_ids"), use_cache=False
        ).last_hidden_state


def regress_heads(model: HybridMemForCausalLM, batch: Batch, beyond: Bool[Tensor, "batch time"]) -> Regression:
    """Return the errors of window and memory against full attention, head by head, with their gradients.

    The model reads the batch with all heads `full`. Each memory head's error is ‖o − o_full‖² / ‖o_full‖² over the
    tokens of `beyond`, and the loss is the mean over all heads. No gradient passes through the base model, and only one
    layer's graph is in memory at a time.
    """
    sources = model.config.head_sources
    assert sources is not None
    fitted = [n for n, row in enumerate(sources) if "memory" in row]
    config = model.config
    total = sum(row.count("memory") for row in sources) * config.num_attention_heads // config.num_key_value_heads
    errors: list[Tensor] = []
    gradients: dict[nn.Parameter, Tensor] = {}
    targets: dict[int, Tensor] = {}

    def note(number: int, _: Any, inputs: tuple[Tensor]) -> None:
        targets[number] = inputs[0]

    def fit(number: int, mixer: HeadMixer, inputs: tuple[Any, ...], _: Any) -> None:
        x, _, sequence = inputs
        parameters = [p for p in mixer.parameters() if p.requires_grad]
        heads = [n for n, source in enumerate(sources[number]) if source == "memory"]
        target = targets.pop(number).unflatten(-1, (mixer.kv_heads, -1, mixer.head_dim))
        with torch.enable_grad():
            mixed, _, _ = mixer.mix(x.detach(), None, replace(sequence, heads=HeadChoice(sources, None)))
            error = relative_errors(mixed.unflatten(2, (mixer.kv_heads, -1)), target, heads, beyond)
            if error.requires_grad:  # false if no row is longer than the window
                found = torch.autograd.grad(error.sum() / total, parameters, allow_unused=True)
                gradients.update({p: g for p, g in zip(parameters, found, strict=True) if g is not None})
        errors.append(error.detach())

    mixers: dict[int, Any] = {n: model.model.layers[n].mixer for n in fitted}
    handles = [mixer.o_proj.register_forward_pre_hook(partial(note, n)) for n, mixer in mixers.items()]
    handles += [mixer.register_forward_hook(partial(fit, n)) for n, mixer in mixers.items()]
    try:
        with torch.no_grad():
            read(model, batch, every_source(model, "full"))
    finally:
        for handle in handles:
            handle.remove()
    return Regression(torch.cat(errors), gradients)


def relative_errors(
    mixed: Float[Tensor, "batch time kv_heads group dim"],
    target: Float[Tensor, "batch time kv_heads group dim"],
    kv_heads: Sequence[int],
    beyond: Bool[Tensor, "batch time"],
) -> Float[Tensor, " heads"]:
    """Return ‖mixed − target‖² / ‖target‖² over the tokens of `beyond`, for each query head of `kv_heads`."""
    own, wanted = (pick(x, kv_heads, 2)[beyond].float() for x in (mixed, target))
    errors = (own - wanted).square().sum((0, 3)) / wanted.square().sum((0, 3)).clamp(min=1e-12)
    return errors.flatten()


class KnownGradients(torch.autograd.Function):
    """Loss with precomputed gradients, which trainer, strategy and precision treat like any other loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        """Return the loss; `gradients` and `parameters` correspond one to one."""
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return the precomputed gradients, scaled."""
        return None, None, *(grad.to(g.dtype) * g for g in ctx.gradients)


def with_gradients(loss: Tensor, gradients: dict[nn.Parameter, Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return a loss whose backward pass yields these gradients, and zeros for all other `parameters`."""
    found = [gradients[p] if p in gradients else torch.zeros_like(p) for p in parameters]
    result: Tensor = KnownGradients.apply(loss, found, *parameters)
    return result


def kl_to_base(
    model: HybridMemForCausalLM,
    hidden: Float[Tensor, "tokens hidden"],
    base_hidden: Float[Tensor, "tokens hidden"],
) -> Float[Tensor, ""]:
    """Return KL(base ‖ model) of the next-token distributions, summed over tokens, in nats."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for own, base in zip(hidden.split(KL_TOKENS), base_hidden.split(KL_TOKENS), strict=True):
        logs = F.log_softmax(model.lm_head(own).float(), dim=-1)
        with torch.no_grad():
            wanted = F.log_softmax(model.lm_head(base).float(), dim=-1)
        total = total + F.kl_div(logs, wanted, log_target=True, reduction="sum")
    return total


def nats_beyond(
    model: HybridMemForCausalLM,
    hidden: Float[Tensor, "batch time hidden"],
    labels: Int[Tensor, "batch time"],
    counted: Bool[Tensor, "batch time"],
) -> Float[Tensor, " tokens"]:
    """Return the negative log-likelihoods of the counted labels, in nats."""
    parts = zip(hidden[counted].split(KL_TOKENS), labels[counted].split(KL_TOKENS), strict=True)
    found = [F.cross_entropy(model.lm_head(x).float(), label, reduction="none") for x, label in parts]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)
