"""Image patches as tokens of a text model: a fixed projection puts them where embeddings are."""

from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@lru_cache(maxsize=8)
def patch_projection(pixels: int, hidden_size: int) -> Float[Tensor, "pixels hidden"]:
    """A random orthogonal map that every process draws alike: nothing to train, nothing to save.

    Raises:
        ValueError: a model too narrow to hold a patch.
    """
    if hidden_size < pixels:
        raise ValueError(f"hidden_size={hidden_size} must be at least {pixels}, the pixels of a patch")
    square = torch.randn(hidden_size, pixels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(square).Q.T.float()


def embed_patches(
    images: Float[Tensor, "batch patches pixels"], embedding: nn.Module
) -> Float[Tensor, "batch patches hidden"]:
    """Patches as embeddings, about as long as those of a model's tokens."""
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    projection = patch_projection(images.shape[-1], weight.shape[-1]).to(weight)
    typical = weight.detach().square().mean().sqrt() * weight.shape[-1] ** 0.5
    scale = typical / (images.shape[-1] ** 0.5 * 0.5)  # a patch of 64 pixels in [0, 1] is about 4 long
    return images.to(weight) @ projection * scale


def embed_with_patches(
    images: Float[Tensor, "batch patches pixels"],
    input_ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"] | None,
    embedding: nn.Module,
) -> Float[Tensor, "batch time hidden"]:
    """A model's inputs_embeds: each row's first tokens behind the padding on its left give way to its patches."""
    rows = embedding(input_ids)
    patches = embed_patches(images, embedding).to(rows.dtype)
    start = torch.zeros_like(input_ids[:, :1]) if mask is None else mask.long().argmax(1, keepdim=True)
    places = start + torch.arange(images.shape[1], device=rows.device)
    return rows.scatter(1, places.unsqueeze(-1).expand_as(patches), patches)
