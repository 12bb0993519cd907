"""Groups of sampled responses: each prompt is read once, then answered many times."""

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


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn; the names are TRL's.

    Args:
        max_completion_length: tokens of the longest response, its end among them.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k, top_p, min_p: leave out unlikely tokens; off by default, because the ratios of token objectives
            assume the whole distribution.

    Raises:
        ValueError: a value that cannot work.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length={self.max_completion_length} must be at least 1")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1:
            raise ValueError(
                f"temperature={self.temperature} and top_k={self.top_k} must be at least 0, top_p={self.top_p} in "
                f"(0, 1] and min_p={self.min_p} in [0, 1)"
            )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A model in evaluation mode for a while, and whole where processes share its weights."""
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
    """Answer each prompt `num_generations` times.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        prompts: what to answer.
        num_generations: responses to each prompt.
        sampling: how tokens are drawn.
        eos_token_ids: tokens that end a response.
        pad_token_id: what stands behind the end.
        generator: of the random numbers, or one for each prompt: its responses then do not depend on the others.
        actions: choices of objectives, one row a response. Each prompt is read once and its state handed to all its
            responses, unless an action lets every response read the prompt in its own way.
    """
    logits, cache = prefill(model, prompts, num_generations, actions)
    rows = prompts.repeat(num_generations)
    ends = torch.tensor(eos_token_ids, device=logits.device)
    finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    ids, masks, logps = [], [], []
    while True:
        tokens, chosen = draw_next(logits, sampling, generator, model, rows)
        ids.append(torch.where(finished, pad_token_id, tokens))
        masks.append(~finished)
        logps.append(chosen.masked_fill(finished, 0))
        finished = finished | torch.isin(tokens, ends)
        if len(ids) == sampling.max_completion_length or bool(finished.all()):
            break
        rows = rows.followed_by(ids[-1][:, None])
        with reading(actions, model, "response"):
            logits = read(model, rows.last(1), cache)[:, -1]
    return Completions(torch.stack(ids, 1), torch.stack(masks, 1), ~finished, torch.stack(logps, 1))


def prefill(
    model: Any, prompts: PromptBatch, num_generations: int, actions: Sequence[Action] = ()
) -> tuple[Float[Tensor, "rows vocab"], DynamicCache]:
    """Read each prompt, once if the actions allow it; return the logits after it and its cache for every response."""
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
        NonFiniteLogits: names the first layer of the model whose output is not finite; it reads the rows once more.
    """
    try:
        return draw(logits, sampling, generator)
    except NonFiniteLogits as error:
        layer = first_non_finite_layer(model, lambda: read(model, read_so_far, None))
        source = "the layers' outputs are finite" if layer is None else f"first in the output of {layer}"
        raise NonFiniteLogits(f"{error} ({source})") from error


def read(
    model: Any, new: PromptBatch, cache: DynamicCache | None, logits_to_keep: int = 1
) -> Float[Tensor, "rows kept vocab"]:
    """The logits behind the last of some new tokens; the mask may tell of those before them too."""
    tokens = _as_input(model, new)
    if new.attention_mask is not None:
        tokens["attention_mask"] = new.attention_mask.long()
        tokens["position_ids"] = positions(new.attention_mask)[:, -new.input_ids.shape[1] :]
    if new.position_ids is not None:
        tokens["position_ids"] = new.position_ids
    caching = cache is not None
    return model(**tokens, past_key_values=cache, use_cache=caching, logits_to_keep=logits_to_keep).logits.float()


def _as_input(model: Any, rows: PromptBatch) -> dict[str, Tensor]:
    """What a model takes rows as."""
    if rows.images is None:
        return {"input_ids": rows.input_ids}
    if rows.image_grid_thw is not None:
        pixels = rows.images.flatten(0, 1)
        return {"input_ids": rows.input_ids, "pixel_values": pixels, "image_grid_thw": rows.image_grid_thw}
    embedding = model.get_input_embeddings()
    return {"inputs_embeds": embed_with_patches(rows.images, rows.input_ids, rows.attention_mask, embedding)}


def positions(mask: Bool[Tensor, "rows time"]) -> Int[Tensor, "rows time"]:
    """Each token's position behind the padding on the left."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def draw(
    logits: Float[Tensor, "rows vocab"], sampling: Sampling, generator: Generators
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Draw a token for each row; return it and its log-probability.

    A vocabulary may be masked with −inf, as long as a finite logit remains.

    Raises:
        NonFiniteLogits: a row has no distribution over next tokens.
    """
    if not logits.amax(-1).isfinite().all():
        raise NonFiniteLogits("the policy's logits are not finite")
    if sampling.temperature == 0:
        logps = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
    else:
        logps = (logits / sampling.temperature).log_softmax(-1)
        probabilities = _filtered(logps, sampling).exp()
        tokens = _multinomial(probabilities, generator)
    return tokens, logps.gather(1, tokens[:, None]).squeeze(1)


def _multinomial(probabilities: Float[Tensor, "rows vocab"], generator: Generators) -> Int[Tensor, " rows"]:
    """A number in [0, 1) for each row says which token: torch.multinomial would draw one for each token."""
    each = generator if isinstance(generator, Sequence) else [generator]
    device, groups = probabilities.device, zip(probabilities.chunk(len(each)), each, strict=True)
    numbers = [torch.rand(len(p), 1, dtype=torch.float64, device=device, generator=own) for p, own in groups]
    below = probabilities.double().cumsum(-1)
    return torch.searchsorted(below, torch.cat(numbers) * below[:, -1:], right=True).squeeze(1)


def _filtered(logps: Float[Tensor, "rows vocab"], sampling: Sampling) -> Float[Tensor, "rows vocab"]:
    """Leave out all but the likeliest tokens, where the settings ask for it; a row keeps its best one."""
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
