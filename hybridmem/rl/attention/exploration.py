"""Exploration in attention space: seeded noise on each response's attention during the rollout.

Without noise, the responses of a group attend differently only after their tokens diverge. With noise, p_old is the
noisy distribution of the rollout, and rewards distinguish attention patterns from the first token on.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hybridmem.model.attention import ShortRangeAttention
from hybridmem.model.mixers import ContextMixer, GateMixer
from hybridmem.model.modeling import HybridMemLayer

from .action import Part
from .passes import NewTokens, attending_with, before_passes
from .recorder import AttentionRecord, decoder_layers

Noise = dict[int, Tensor]  # layer: (responses, heads, time) for attention, (responses, channels) for gates


def draw_noise(
    model: nn.Module,
    target: str,
    layers: list[int],
    sigma: float,
    num_prompts: int,
    num_generations: int,
    time: int,
    generator: torch.Generator | Sequence[torch.Generator],
) -> Noise:
    """Draw Gaussian noise of standard deviation `sigma` for every response, reused at all its query positions.

    The noise applies to the logits of every head and key (`attention`), of the allocation gate (`allocation`) or of the
    memory's gates (`memory`). Adjacent responses of a group form antithetic pairs with opposite noise, which centres
    the baseline. `generator` is shared by all prompts, or a sequence with one per prompt.

    Raises:
        ValueError: Noise on the target is undefined for a layer's variant.
    """
    found = decoder_layers(model)
    noise = {}
    for number in layers:
        shape = _noise_shape(found[number], target, time)
        half = -(-num_generations // 2)
        each = list(generator) if isinstance(generator, Sequence) else [generator]
        count = num_prompts // len(each)
        drawn = sigma * torch.cat([torch.randn(count, half, *shape, generator=g, device=g.device) for g in each])
        pairs = torch.stack((drawn, -drawn), dim=2).flatten(1, 2)[:, :num_generations]
        noise[number] = pairs.flatten(0, 1)
    return noise


@dataclass(frozen=True)
class Exploration:
    """Action of AttentionRL: the noise on the attention of a rollout's responses."""

    target: str
    noise: Noise

    @property
    def prefill_once(self) -> bool:
        """Return False, because each response attends to its prompt with its own noise."""
        return False

    @property
    def in_passes(self) -> bool:
        """Return False, because the policy is scored without the noise."""
        return False

    def applied(self, model: Any, part: Part = "response") -> AbstractContextManager[None]:
        """Return a context in which the model adds the noise, to prompts and responses alike."""
        return explored(model, self.target, self.noise)

    def cut(self, time: int) -> "Exploration":
        """Return the noise on the first `time` tokens."""
        return replace(self, noise=cut_noise(self.noise, time))

    def select(self, rows: Int[Tensor, " rows"]) -> "Exploration":
        """Return the noise of the selected responses."""
        return replace(self, noise={number: eps[rows] for number, eps in self.noise.items()})


def cut_noise(noise: Noise, time: int) -> Noise:
    """Cut noise to the first `time` tokens, the number that the rollout read in the end."""
    return {number: eps[..., :time] if eps.dim() == 3 else eps for number, eps in noise.items()}


def _noise_shape(layer: Any, target: str, time: int) -> tuple[int, ...]:
    own = isinstance(layer, HybridMemLayer)
    mixer: Any = layer.mixer if own else None
    if target == "attention" and (not own or (hasattr(mixer, "attention") and not isinstance(mixer, ContextMixer))):
        return (mixer.attention.heads if own else layer.config.num_attention_heads, time)
    if target == "allocation" and isinstance(mixer, GateMixer):
        return (mixer.allocation_gate.out_features,)
    if target == "memory" and hasattr(mixer, "memory"):
        return (mixer.memory.gate_proj.out_features,)
    kind = layer.variant if own else type(layer).__name__
    raise ValueError(
        f"a layer of {kind} does not support exploration of target={target!r}: use attention (all variants except "
        "mac and lmm), allocation (mag) or memory (mag, mac, mal, lmm), or set exploration=0"
    )


@contextmanager
def explored(model: Any, target: str, noise: Noise) -> Iterator[None]:
    """Run a model with noise in the given layers, one row per response; the model is restored on exit."""
    found = decoder_layers(model)
    with ExitStack() as stack:
        if target == "attention":
            stack.enter_context(_noisy_attention(model, {_attention(found[n]): eps for n, eps in noise.items()}))
        else:
            for number, eps in noise.items():
                mixer = found[number].mixer
                gate = mixer.allocation_gate if target == "allocation" else mixer.memory.gate_proj
                stack.callback(gate.register_forward_hook(_adding(eps)).remove)
        yield


def with_noise(record: AttentionRecord, noise: Float[Tensor, "batch heads time"]) -> AttentionRecord:
    """Add noise to an attention record through an extra channel in which q · k equals the noise.

    Noise and keys are aligned at the last token, because a window's cache keeps only the last keys.
    """
    q, front = record.q, record.num_persistent
    k = record.k.repeat_interleave(q.shape[1] // record.k.shape[1], dim=1)
    noise = torch.nn.functional.pad(noise[..., noise.shape[-1] - (k.shape[2] - front) :], (front, 0)).to(k.dtype)
    k = torch.cat((k, noise.unsqueeze(-1)), dim=-1)
    q = torch.cat((q, q.new_full((*q.shape[:3], 1), 1 / record.scale)), dim=-1)
    return replace(record, q=q, k=k)


def _attention(layer: Any) -> Any:
    return layer.mixer.attention if isinstance(layer, HybridMemLayer) else layer


def _adding(noise: Float[Tensor, "batch channels"]) -> Any:
    def add(_: nn.Module, __: tuple[Any, ...], logits: Tensor) -> Tensor:
        return logits + noise[:, None].to(logits.dtype)

    return add


@contextmanager
def _noisy_attention(model: Any, noise: dict[nn.Module, Float[Tensor, "batch heads time"]]) -> Iterator[None]:
    """Switch to an attention function that adds noise to the logits of the given modules."""
    read = 0  # number of tokens read by the end of the current pass

    def begin(new: NewTokens) -> None:
        nonlocal read
        read = new.past + new.length

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        if module in noise:
            front = module.num_persistent if isinstance(module, ShortRangeAttention) else 0
            kept = key.shape[2] - front
            bias = noise[module][:, :, None, read - kept : read]
            bias = torch.nn.functional.pad(bias, (front, 0)).to(query.dtype)
            attention_mask = bias if attention_mask is None else bias.where(attention_mask, torch.finfo(bias.dtype).min)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    with before_passes(model, begin), attending_with(model, attend):
        yield
