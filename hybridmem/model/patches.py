"""Image patches as tokens of a text model: a fixed map from pixels and positions to embeddings."""

import math
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@lru_cache(maxsize=8)
def patch_projection(pixels: int, hidden_size: int) -> Float[Tensor, "pixels hidden"]:
    """Draw a fixed random orthogonal map, identical in every process, which needs no training and no saving.

    Raises:
        ValueError: the model is too narrow to hold a patch.
    """
    if hidden_size < pixels:
        raise ValueError(f"hidden_size={hidden_size} must be at least {pixels}, the number of pixels per patch")
    square = torch.randn(hidden_size, pixels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(square).Q.T.float()


@lru_cache(maxsize=8)
def place_codes(patches: int, hidden_size: int) -> Float[Tensor, "patches hidden"]:
    """Encode each patch's row and column as sines and cosines; patches form a square if possible, else one row."""
    side = math.isqrt(patches)
    width = side if side**2 == patches else patches
    places = torch.arange(patches)
    slowest = 4.0 * width  # from a quarter turn per patch down to a sixteenth of a turn over the whole image
    turns = slowest ** -torch.linspace(0, 1, -(-hidden_size // 4)) * math.pi / 2
    angles = [axis.unsqueeze(-1) * turns for axis in (places // width, places % width)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=-1)[:, :hidden_size]


def embed_patches(
    images: Float[Tensor, "batch patches pixels"], embedding: nn.Module
) -> Float[Tensor, "batch patches hidden"]:
    """Embed the contrast and the position of patches, with a norm similar to the model's token embeddings."""
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    pixels, hidden = images.shape[-1], weight.shape[-1]
    contrast = nn.functional.layer_norm(images.to(weight), (pixels,)) @ patch_projection(pixels, hidden).to(weight)
    places = place_codes(images.shape[1], hidden).to(weight)
    typical = weight.detach().square().mean().sqrt() * hidden**0.5
    return (contrast / pixels**0.5 + places / (hidden / 2) ** 0.5) * typical / 2**0.5


def embed_with_patches(
    images: Float[Tensor, "batch patches pixels"],
    input_ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"] | None,
    embedding: nn.Module,
) -> Float[Tensor, "batch time hidden"]:
    """Return inputs_embeds in which patches replace the first tokens of each row, after any left padding."""
    rows = embedding(input_ids)
    patches = embed_patches(images, embedding).to(rows.dtype)
    start = torch.zeros_like(input_ids[:, :1]) if mask is None else mask.long().argmax(1, keepdim=True)
    places = start + torch.arange(images.shape[1], device=rows.device)
    return rows.scatter(1, places.unsqueeze(-1).expand_as(patches), patches)
