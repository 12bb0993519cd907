"""Image patches as tokens of a text model: a fixed map puts what they show, and where, where embeddings are."""

import math
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


@lru_cache(maxsize=8)
def place_codes(patches: int, hidden_size: int) -> Float[Tensor, "patches hidden"]:
    """Where a patch stands, as sines and cosines of its row and its column: of a square field, or else of one row."""
    side = math.isqrt(patches)
    width = side if side**2 == patches else patches
    places = torch.arange(patches)
    slowest = 4.0 * width  # a quarter turn from patch to patch, down to a sixteenth over the whole field
    turns = slowest ** -torch.linspace(0, 1, -(-hidden_size // 4)) * math.pi / 2
    angles = [axis.unsqueeze(-1) * turns for axis in (places // width, places % width)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=-1)[:, :hidden_size]


def embed_patches(
    images: Float[Tensor, "batch patches pixels"], embedding: nn.Module
) -> Float[Tensor, "batch patches hidden"]:
    """Patches as embeddings, about as long as those of a model's tokens: their contrast, and where they stand."""
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
    """A model's inputs_embeds: each row's first tokens behind the padding on its left give way to its patches."""
    rows = embedding(input_ids)
    patches = embed_patches(images, embedding).to(rows.dtype)
    start = torch.zeros_like(input_ids[:, :1]) if mask is None else mask.long().argmax(1, keepdim=True)
    places = start + torch.arange(images.shape[1], device=rows.device)
    return rows.scatter(1, places.unsqueeze(-1).expand_as(patches), patches)
