"""Checkpoint format of the states carried from row to row."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from hybridmem.distributed import rank_and_size
from hybridmem.model.state import map_state

SavedCache = list[tuple[Any, ...]] | None


def save_cache(cache: DynamicCache | None) -> SavedCache:
    """Return the carried states as plain values on the CPU."""
    if cache is None:
        return None
    return [
        (*map_state(lambda x: x.cpu(), (layer.state, layer.last_document)), layer.seen_tokens) for layer in cache.layers
    ]


def own_cache(saved: list[SavedCache]) -> SavedCache:
    """Return this rank's rows of the states that all ranks of a run saved.

    Raises:
        ValueError: the number of ranks has changed and the saved states differ in shape, as they may for mac layers.
    """
    rank, size = rank_and_size()
    if len(saved) == size:
        return saved[rank]
    own = []
    for layers in zip(*(layers or () for layers in saved), strict=True):
        *states, seen = zip(*layers, strict=True)
        try:
            merged = [map_state(lambda *parts: torch.stack(parts, 1).flatten(0, 1), *parts) for parts in states]
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"the checkpoint's carried states come from {len(saved)} processes, differ in shape and cannot be "
                f"redistributed over {size}; resume with {len(saved)} processes"
            ) from error
        own.append((*map_state(lambda x: x[rank::size].clone(), tuple(merged)), seen[0]))
    return own or None


def restore_cache(saved: SavedCache, config: PreTrainedConfig) -> DynamicCache | None:
    """Rebuild the cache from the values of `save_cache`."""
    if saved is None:
        return None
    cache = DynamicCache(config=config)
    for layer, (state, last_document, seen_tokens) in zip(cache.layers, saved, strict=True):
        layer.state, layer.seen_tokens, layer.last_document = state, seen_tokens, last_document
        layer.is_initialized = state is not None
    return cache
