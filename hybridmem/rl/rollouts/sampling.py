"""Sampling of response groups that share one prefill of their prompt."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from hybridmem.distributed import unsharded
from hybridmem.model.patches import embed_with_patches
from hybridmem.rl.attention.action import Action, prefilled_once, reading

from .completions import Completions
from .non_finite import NonFiniteLogits, first_non_finite_layer
from .prompts import PromptBatch
from .random_streams import Generators

LOWEST = 1e-6  # temperature above 0; quotients of logits by lower ones overflow


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings under TRL's names.

    Args:
        max_completion_length: the maximum number of tokens in a response, EOS included.
        temperature: divides the logits; 0 is greedy decoding, and other values are at least 1e-6.
        top_k, top_p, min_p: exclude unlikely tokens. All are off by default, because importance ratios assume samples
            from the full distribution.

    Raises:
        ValueError: A setting is out of range.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length={self.max_completion_length} must be at least 1")
        if self.temperature != 0 and not LOWEST <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be 0 for greedy decoding, or at least {LOWEST}, since logits are "
                "divided by it"
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1:
            raise ValueError(
                f"top_k={self.top_k} must be at least 0, top_p={self.top_p} in (0, 1] and min_p={self.min_p} in [0, 1)"
            )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode and gather its sharded weights inside the context."""
    training = model.training
    model.eval()
    try:
        with unsharded(model):
            yield
    finally:
        model.train(training)


@torch.no_grad()
def sample(
    model: Any,
    prompts: PromptBatch,
    num_generations: int,
    sampling: Sampling,
    eos_token_ids: list[int],
    pad_token_id: int,
    generator: Generators = None,
    actions: Sequence[Action] = (),
) -> Completions:
    """Sample `num_generations` responses to each prompt.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        prompts: the prompts to answer.
        num_generations: the number of responses per prompt.
        sampling: the sampling settings.
        eos_token_ids: tokens that end a response.
        pad_token_id: the token that fills rows after EOS.
        generator: a random generator, or one per prompt, which makes a prompt's responses independent of the batch.
        actions: choices of objectives, with one row per response. Each prompt is prefilled once and its cache shared
            among its responses, unless an action makes every response read the prompt in its own way.
    """
    logits, cache = prefill(model, prompts, num_generations, actions)
    rows = prompts.repeat(num_generations)
    ends = torch.tensor(eos_token_ids, device=logits.device)
    finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    ids, masks, logps = [], [], []
    with reading(actions, model, "response"):
        while True:
            tokens, chosen = draw_next(logits, sampling, generator, model, rows)
            ids.append(torch.where(finished, pad_token_id, tokens))
            masks.append(~finished)
            logps.append(chosen.masked_fill(finished, 0))
            finished = finished | torch.isin(tokens, ends)
            if len(ids) == sampling.max_completion_length or bool(finished.all()):
                break
            rows = rows.followed_by(ids[-1][:, None])
            logits = read(model, rows.last(1), cache)[:, -1]
    return Completions(torch.stack(ids, 1), torch.stack(masks, 1), ~finished, torch.stack(logps, 1))


def prefill(
    model: Any, prompts: PromptBatch, num_generations: int, actions: Sequence[Action] = ()
) -> tuple[Float[Tensor, "rows vocab"], DynamicCache]:
    """Prefill each prompt, once if the actions allow it; return next-token logits and a cache for every response."""
    cache = DynamicCache(config=model.config.get_text_config())
    fan_out = num_generations
    if not prefilled_once(actions):
        prompts, fan_out = prompts.repeat(num_generations), 1
    with reading(actions, model, "prompt"):
        logits = read(model, prompts, cache)[:, -1]
    if fan_out > 1:
        cache.batch_repeat_interleave(fan_out)
        logits = logits.repeat_interleave(fan_out, dim=0)
    return logits, cache


def draw_next(
    logits: Float[Tensor, "rows vocab"], sampling: Sampling, generator: Generators, model: Any, read_so_far: PromptBatch
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Draw a token for each row (see `draw`).

    Raises:
        NonFiniteLogits: A row's logits are non-finite. The model reads the rows again to name the first faulty layer.
    """
    try:
        return draw(logits, sampling, generator)
    except NonFiniteLogits as error:
        layer = first_non_finite_layer(model, lambda: read(model, read_so_far, None))
        source = "all layers have finite outputs" if layer is None else f"first in the output of {layer}"
        raise NonFiniteLogits(f"{error} ({source})") from error


def read(
    model: Any, new: PromptBatch, cache: DynamicCache | None, logits_to_keep: int = 1
) -> Float[Tensor, "rows kept vocab"]:
    """Return the logits at the last of some new tokens, in float32 or, for float64 models, in float64.

    The attention mask may also cover the cached tokens.
    """
    caching, tokens = cache is not None, inputs_of(model, new)
    logits = model(**tokens, past_key_values=cache, use_cache=caching, logits_to_keep=logits_to_keep).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def inputs_of(model: Any, new: PromptBatch) -> dict[str, Tensor]:
    """Return the model's keyword arguments for some new tokens, their mask and positions included."""
    tokens = _as_input(model, new)
    if new.attention_mask is not None:
        tokens["attention_mask"] = new.attention_mask.long()
        tokens["position_ids"] = positions(new.attention_mask)[:, -new.input_ids.shape[1] :]
    if new.position_ids is not None:
        tokens["position_ids"] = new.position_ids
    return tokens


def _as_input(model: Any, rows: PromptBatch) -> dict[str, Tensor]:
    """Return rows as the model's keyword arguments: token ids, with pixels or patch embeddings for images."""
    if rows.images is None:
        return {"input_ids": rows.input_ids}
    if rows.image_grid_thw is not None:
        pixels = rows.images.flatten(0, 1)
        return {"input_ids": rows.input_ids, "pixel_values": pixels, "image_grid_thw": rows.image_grid_thw}
    embedding = model.get_input_embeddings()
    return {"inputs_embeds": embed_with_patches(rows.images, rows.input_ids, rows.attention_mask, embedding)}


def positions(mask: Bool[Tensor, "rows time"]) -> Int[Tensor, "rows time"]:
    """Return token positions that ignore the padding on the left."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def draw(
    logits: Float[Tensor, "rows vocab"], sampling: Sampling, generator: Generators
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Draw a token for each row; return the tokens and their log-probabilities.

    Logits of −inf mask tokens; each row needs at least one finite logit.

    Raises:
        NonFiniteLogits: A row's largest logit is NaN or infinite.
    """
    if not logits.amax(-1).isfinite().all():
        raise NonFiniteLogits("the policy's logits are non-finite")
    if sampling.temperature == 0:
        logps = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
    else:
        logps = (logits / sampling.temperature).log_softmax(-1)
        probabilities = _filtered(logps, sampling).exp()
        tokens = _multinomial(probabilities, generator)
    return tokens, logps.gather(1, tokens[:, None]).squeeze(1)


def _multinomial(probabilities: Float[Tensor, "rows vocab"], generator: Generators) -> Int[Tensor, " rows"]:
    """Sample by inverting the CDF: one random number per row, where torch.multinomial draws one per token."""
    each = generator if isinstance(generator, Sequence) else [generator]
    device, groups = probabilities.device, zip(probabilities.chunk(len(each)), each, strict=True)
    numbers = [torch.rand(len(p), 1, dtype=torch.float64, device=device, generator=own) for p, own in groups]
    below = probabilities.double().cumsum(-1)
    return torch.searchsorted(below, torch.cat(numbers) * below[:, -1:], right=True).squeeze(1)


def _filtered(logps: Float[Tensor, "rows vocab"], sampling: Sampling) -> Float[Tensor, "rows vocab"]:
    """Apply top_k, min_p and top_p; each row keeps at least its likeliest token."""
    if 0 < sampling.top_k < logps.shape[-1]:
        logps = logps.masked_fill(logps < logps.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.min_p > 0:
        floor = logps.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log()
        logps = logps.masked_fill(logps < floor, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logps.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        logps = logps.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logps
