"""Importance ratios that cannot overflow."""

from jaxtyping import Float
from torch import Tensor

MAX_LOG_RATIO = 20.0  # nats, as in verl; exp overflows at 89, which makes a clipped token's gradient 0 · inf


def clamp_log_ratio(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Limit the logarithm of a probability ratio to ±MAX_LOG_RATIO, so that its exponential and gradient are finite."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
