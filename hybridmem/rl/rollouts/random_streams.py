"""Independent random generators for each purpose, prompt and rollout."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch

Generators = torch.Generator | Sequence[torch.Generator] | None  # shared by all prompts, or one per prompt


class RandomStream(IntEnum):
    """Purposes of random numbers; different purposes get independent generators."""

    ROLLOUT = 0
    REFINEMENT = 1
    VALIDATION = 2
    CONTRAST = 3


def generators(device: torch.device, *keys: tuple[int, ...]) -> list[torch.Generator]:
    """Return one generator per key; equal keys give equal random numbers on every rank."""
    seeds = (int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1) for key in keys)
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]
