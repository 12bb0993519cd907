"""Independent random numbers for each purpose, prompt and rollout."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch

Generators = torch.Generator | Sequence[torch.Generator] | None  # one for all prompts, or one for each


class RandomStream(IntEnum):
    """The purpose of random numbers; numbers of different purposes are independent."""

    ROLLOUT = 0
    REFINEMENT = 1
    VALIDATION = 2


def generators(device: torch.device, *keys: tuple[int, ...]) -> list[torch.Generator]:
    """Return a generator for each key; equal keys give equal numbers on every rank."""
    seeds = (int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1) for key in keys)
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]
