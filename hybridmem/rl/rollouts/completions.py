"""Sampled responses as tensors."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Completions(NamedTuple):
    """Sampled responses; responses to the same prompt are adjacent."""

    ids: Int[Tensor, "responses length"]  # tokens up to and including EOS, then padding
    mask: Bool[Tensor, "responses length"]  # True at the response's tokens
    truncated: Bool[Tensor, " responses"]  # True if the response was cut off before EOS
    sampled_logps: Float[Tensor, "responses length"]  # before top_k, top_p and min_p; 0 off the mask


def concatenate(parts: list[Completions], pad_id: int) -> Completions:
    """Concatenate the responses of several rollouts, padded to the longest."""
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
