"""Groups of sampled responses: each prompt is read once, then answered many times."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from hybridmem.distributed import unsharded
from hybridmem.model.patches import embed_with_patches

Generators = torch.Generator | Sequence[torch.Generator] | None  # one of all prompts, or one for each
Times = Int[Tensor, " prompts"]  # how many responses each prompt has


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


class PromptBatch(NamedTuple):
    """Prompts as a model reads them, padded on the left."""

    input_ids: Int[Tensor, "prompts time"]
    attention_mask: Bool[Tensor, "prompts time"] | None  # None: no padding
    images: Float[Tensor, "prompts patches pixels"] | None = None
    image_grid_thw: Int[Tensor, "prompts 3"] | None = None  # of a vision model; None: patches replace the first tokens
    position_ids: Int[Tensor, "axes prompts time"] | None = None  # of a vision model

    def repeat(self, times: int | Times) -> "PromptBatch":
        """Each prompt `times` times, or as often as its own number, copies next to one another."""
        return self._map(lambda x, rows: x.repeat_interleave(torch.as_tensor(times, device=x.device), dim=rows))

    def select(self, rows: Int[Tensor, " rows"]) -> "PromptBatch":
        """Some of the prompts."""
        return self._map(lambda x, dim: x.index_select(dim, rows.to(x.device)))

    def followed_by(self, ids: Int[Tensor, "prompts length"]) -> "PromptBatch":
        """The prompts with tokens behind them."""
        mask, places, length = self.attention_mask, self.position_ids, ids.shape[1]
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, length), value=True)
        if places is not None:
            ahead = places.amax((0, 2))[:, None] + torch.arange(1, length + 1, device=places.device)
            places = torch.cat((places, ahead.expand(len(places), -1, -1)), dim=2)
        ids = torch.cat((self.input_ids, ids), dim=1)
        return self._replace(input_ids=ids, attention_mask=mask, position_ids=places)

    def without_last(self) -> "PromptBatch":
        """All but the last token of each."""
        mask, places = self.attention_mask, self.position_ids
        return self._replace(
            input_ids=self.input_ids[:, :-1],
            attention_mask=None if mask is None else mask[:, :-1],
            position_ids=None if places is None else places[..., :-1],
        )

    def last(self, count: int) -> "PromptBatch":
        """The last tokens, which are text, for a model that has read the others; the mask tells of all."""
        places = None if self.position_ids is None else self.position_ids[..., -count:]
        return PromptBatch(self.input_ids[:, -count:], self.attention_mask, position_ids=places)

    def _map(self, function: Callable[[Tensor, int], Tensor]) -> "PromptBatch":
        mask, images, grid, places = self[1:]
        return PromptBatch(
            function(self.input_ids, 0),
            None if mask is None else function(mask, 0),
            None if images is None else function(images, 0),
            None if grid is None else function(grid, 0),
            None if places is None else function(places, 1),
        )


class Completions(NamedTuple):
    """Responses, those to one prompt next to one another."""

    ids: Int[Tensor, "responses length"]  # the end of text among them, padding after it
    mask: Bool[Tensor, "responses length"]  # which are tokens of the response
    truncated: Bool[Tensor, " responses"]  # cut off before an end of text
    sampled_logps: Float[Tensor, "responses length"]  # without top_k, top_p and min_p; 0 off the mask


def concatenate(parts: list[Completions], pad_id: int) -> Completions:
    """Responses of several rollouts as one, as long as the longest."""
    longest = max(part.ids.shape[1] for part in parts)
    longer = []
    for part in parts:
        missing = (0, longest - part.ids.shape[1])
        longer.append(
            Completions(
                torch.nn.functional.pad(part.ids, missing, value=pad_id),
                torch.nn.functional.pad(part.mask, missing),
                part.truncated,
                torch.nn.functional.pad(part.sampled_logps, missing),
            )
        )
    return Completions(*(torch.cat(column) for column in zip(*longer, strict=True)))


def pad_prompts(
    prompts: list[list[int]],
    pad_id: int,
    device: torch.device,
    images: Float[Tensor, "prompts patches pixels"] | None = None,
    image_grid_thw: Int[Tensor, "prompts 3"] | None = None,
) -> PromptBatch:
    """Token lists as a batch.

    Images come before the text, except with `image_grid_thw`: then the prompts hold places for them already.

    Raises:
        ValueError: a prompt without a token.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if not lengths.all():
        raise ValueError(f"prompt {int(lengths.argmin())} of the batch is empty: a response needs a token to follow")
    if images is not None and image_grid_thw is None:
        places = [pad_id] * images.shape[1]
        prompts, lengths = [places + prompt for prompt in prompts], lengths + len(places)
    longest = int(lengths.max())
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = (torch.arange(longest) >= longest - lengths[:, None]).to(device)
    images, image_grid_thw = (None if x is None else x.to(device) for x in (images, image_grid_thw))
    return PromptBatch(ids, None if mask.all() else mask, images, image_grid_thw)


def vision_positions(model: Any, prompts: PromptBatch) -> Int[Tensor, "axes prompts time"] | None:
    """Each token's place in time, height and width, where a vision model has such; None where it counts tokens."""
    places = next((m.get_rope_index for m in model.modules() if hasattr(m, "get_rope_index")), None)
    if places is None:
        return None
    is_image = (prompts.input_ids == model.config.image_token_id).int()
    mask = None if prompts.attention_mask is None else prompts.attention_mask.long()
    return places(prompts.input_ids, is_image, prompts.image_grid_thw, attention_mask=mask)[0]


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
    prefill_once: bool = True,
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
        prefill_once: read each prompt once and hand its state to all its responses; False: every response reads it,
            which it must where responses read differently (attention exploration).
    """
    if not prefill_once:
        prompts, fan_out = prompts.repeat(num_generations), 1
    else:
        fan_out = num_generations
    cache = DynamicCache(config=model.config.get_text_config())
    logits = read(model, prompts, cache)[:, -1]
    if fan_out > 1:
        cache.batch_repeat_interleave(fan_out)
        logits = logits.repeat_interleave(fan_out, dim=0)
    rows = prompts.repeat(fan_out)
    ends = torch.tensor(eos_token_ids, device=logits.device)
    finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    ids, masks, logps = [], [], []
    while True:
        tokens, chosen = draw(logits, sampling, generator)
        ids.append(torch.where(finished, pad_token_id, tokens))
        masks.append(~finished)
        logps.append(chosen.masked_fill(finished, 0))
        finished = finished | torch.isin(tokens, ends)
        if len(ids) == sampling.max_completion_length or bool(finished.all()):
            break
        rows = rows.followed_by(ids[-1][:, None])
        logits = read(model, rows.last(1), cache)[:, -1]
    return Completions(torch.stack(ids, 1), torch.stack(masks, 1), ~finished, torch.stack(logps, 1))


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


def generators(device: torch.device, *keys: tuple[int, ...]) -> list[torch.Generator]:
    """A generator for each key, whatever process asks for it."""
    seeds = (int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1) for key in keys)
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def draw(
    logits: Float[Tensor, "rows vocab"], sampling: Sampling, generator: Generators
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """A token for each row, and its log-probability."""
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


def first_rows(times: int | Times, rows: int) -> Int[Tensor, " prompts"]:
    """Where each prompt's responses begin, of which there are `times` next to one another."""
    if isinstance(times, Tensor):
        return times.cumsum(0) - times
    return torch.arange(0, rows, times)


def completion_logps(
    model: Any, prompts: PromptBatch, completions: Completions, temperature: float, times: int | Times = 1
) -> tuple[Float[Tensor, "responses length"], Float[Tensor, "responses length"]]:
    """Log-probabilities of the generated tokens, and the entropy at each.

    Args:
        model: the policy.
        prompts: of each response, repeated.
        completions: the responses.
        temperature: that the logits are divided by; 0 counts as 1.
        times: how many responses, next to one another, answer one prompt; a number each where they are not as many.
            The prompt is then read once for them all, gradients included, where it has a token before its last one;
            1: each response reads its own.
    """
    length, cache = completions.ids.shape[1], None
    shared = isinstance(times, Tensor) or times > 1
    # What stands behind a response's end is seen by no token that counts.
    rows = prompts.followed_by(completions.ids)
    if shared and prompts.input_ids.shape[1] > 1:
        cache = DynamicCache(config=model.config.get_text_config())
        read(model, prompts.select(first_rows(times, len(rows.input_ids))).without_last(), cache)
        repeats: Any = times.to(rows.input_ids.device) if isinstance(times, Tensor) else times  # a cache takes both
        cache.batch_repeat_interleave(repeats)
        rows = rows.last(length + 1)
    logits = read(model, rows, cache, logits_to_keep=length + 1)[:, :-1]
    logps = (logits / (temperature or 1.0)).log_softmax(-1)
    chosen = logps.gather(2, completions.ids.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1)
    return chosen, entropy
