"""Prompts, alone and as a padded batch that a model reads."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Times = Int[Tensor, " prompts"]  # the number of responses to each prompt


class Prompt(NamedTuple):
    """A question: its tokens, and images before them or, in a processor's prompts, among them."""

    tokens: list[int]
    images: Float[Tensor, "patches pixels"] | None = None
    image_grid_thw: Int[Tensor, " 3"] | None = None  # of a processor's prompts


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


def batch_prompts(prompts: Sequence[Prompt], pad_id: int, device: torch.device) -> PromptBatch:
    """Return prompts as one batch, images included.

    Raises:
        ValueError: a prompt without a token; images in some prompts only, or of different sizes.
    """
    images = _stacked([prompt.images for prompt in prompts])
    grids = _stacked([prompt.image_grid_thw for prompt in prompts])
    return pad_prompts([prompt.tokens for prompt in prompts], pad_id, device, images, grids)


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


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return one tensor of all prompts' parts, or None if they have none."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    if len(found) < len(parts) or len({part.shape for part in found}) > 1:
        raise ValueError("prompts of one batch must all have images, of one size, or none: make the task's examples so")
    return torch.stack(found)
