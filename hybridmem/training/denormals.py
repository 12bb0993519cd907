"""Denormal numbers, which some processors compute with a hundred times more slowly."""

import torch


def flush_denormals() -> bool:
    """Round results below the normal range of floats (1e-38 in float32) to zero.

    A deep memory that forgets comes near zero weights, and its gradients near zero with them: from some thousands of
    tokens on, products of the two are denormal. Intel's processors take up to twice as long for a token then.

    The setting belongs to the calling thread and to the threads that it starts later. Call it before the first tensor
    operation, which starts PyTorch's threads. Returns False where the processor has no such setting.
    """
    return torch.set_flush_denormal(True)
