"""Sampled responses as tensors."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
