"""Prompts, and padded batches of prompts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Times = Int[Tensor, " prompts"]  # the number of responses to each prompt


class Prompt(NamedTuple):
    """A tokenised prompt; its images precede the tokens or, with a processor, have places among them."""

    tokens: list[int]
    images: Float[Tensor, "patches pixels"] | None = None
    image_grid_thw: Int[Tensor, " 3"] | None = None  # set by processors


class PromptBatch(NamedTuple):
    """A left-padded batch of prompts."""

    input_ids: Int[Tensor, "prompts time"]
    attention_mask: Bool[Tensor, "prompts time"] | None  # None: no padding
    images: Float[Tensor, "prompts patches pixels"] | None = None
    image_grid_thw: Int[Tensor, "prompts 3"] | None = None  # vision models; None: patches replace the first tokens
    position_ids: Int[Tensor, "axes prompts time"] | None = None  # vision models

    def repeat(self, times: int | Times) -> "PromptBatch":
        """Repeat each prompt `times` times, or by its own number; copies are adjacent."""
        return self._map(lambda x, rows: x.repeat_interleave(torch.as_tensor(times, device=x.device), dim=rows))

    def select(self, rows: Int[Tensor, " rows"]) -> "PromptBatch":
        """Return the selected prompts."""
        return self._map(lambda x, dim: x.index_select(dim, rows.to(x.device)))

    def followed_by(self, ids: Int[Tensor, "prompts length"]) -> "PromptBatch":
        """Append tokens to the prompts."""
        mask, places, length = self.attention_mask, self.position_ids, ids.shape[1]
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, length), value=True)
        if places is not None:
            ahead = places.amax((0, 2))[:, None] + torch.arange(1, length + 1, device=places.device)
            places = torch.cat((places, ahead.expand(len(places), -1, -1)), dim=2)
        ids = torch.cat((self.input_ids, ids), dim=1)
        return self._replace(input_ids=ids, attention_mask=mask, position_ids=places)

    def without_last(self) -> "PromptBatch":
        """Return the prompts without their last token."""
        mask, places = self.attention_mask, self.position_ids
        return self._replace(
            input_ids=self.input_ids[:, :-1],
            attention_mask=None if mask is None else mask[:, :-1],
            position_ids=None if places is None else places[..., :-1],
        )

    def last(self, count: int) -> "PromptBatch":
        """Return the last `count` text tokens for a model with a cache of the others; the mask covers all tokens."""
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
    """Batch prompts with their images.

    Raises:
        ValueError: A prompt is empty, only some prompts have images, or image sizes differ.
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
    """Pad lists of tokens to a batch.

    Images precede the text, unless `image_grid_thw` is given: then the prompts already contain image tokens.

    Raises:
        ValueError: A prompt is empty.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if not lengths.all():
        raise ValueError(f"prompt {int(lengths.argmin())} of the batch is empty; a prompt needs at least one token")
    if images is not None and image_grid_thw is None:
        places = [pad_id] * images.shape[1]
        prompts, lengths = [places + prompt for prompt in prompts], lengths + len(places)
    longest = int(lengths.max())
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = (torch.arange(longest) >= longest - lengths[:, None]).to(device)
    images, image_grid_thw = (None if x is None else x.to(device) for x in (images, image_grid_thw))
    return PromptBatch(ids, None if mask.all() else mask, images, image_grid_thw)


def vision_positions(model: Any, prompts: PromptBatch) -> Int[Tensor, "axes prompts time"] | None:
    """Return token positions in time, height and width if the model uses such, or None for plain positions."""
    places = next((m.get_rope_index for m in model.modules() if hasattr(m, "get_rope_index")), None)
    if places is None:
        return None
    is_image = (prompts.input_ids == model.config.image_token_id).int()
    mask = None if prompts.attention_mask is None else prompts.attention_mask.long()
    return places(prompts.input_ids, is_image, prompts.image_grid_thw, attention_mask=mask)[0]


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Stack one tensor per prompt; return None if no prompt has one."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    if len(found) < len(parts) or len({part.shape for part in found}) > 1:
        raise ValueError(
            "a batch mixes prompts with and without images, or images of different sizes; give every example of the "
            "task an image of one size, or none"
        )
    return torch.stack(found)
