"""Importance ratios that cannot overflow."""

import torch
from jaxtyping import Float
from torch import Tensor

MAX_LOG_RATIO = 20.0  # nats, as in verl; exp overflows at 89, which makes a clipped token's gradient 0 · inf


def clamp_log_ratio(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Limit the logarithm of a probability ratio to ±MAX_LOG_RATIO, so that its exponential and gradient are finite.

    The result is in float32 or, for float64, in float64; float16 already overflows at 11 nats.
    """
    return log_ratio.to(torch.promote_types(log_ratio.dtype, torch.float32)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
