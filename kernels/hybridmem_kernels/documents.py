"""Document boundaries in packed, padded rows, and their effect on gates."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def document_starts(
    document_ids: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"] | None = None
) -> Bool[Tensor, "batch time"]:
    """Mark the tokens at which a new document begins; the first token of a row continues the given state.

    Masked tokens belong to no document: each token is compared with the last unmasked token before it.
    """
    starts = torch.zeros_like(document_ids, dtype=torch.bool)
    if mask is None:
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        return starts
    time = torch.arange(document_ids.shape[1], device=document_ids.device)
    last_valid = torch.where(mask, time, -1).cummax(dim=1).values[:, :-1]
    previous_id = document_ids.gather(1, last_valid.clamp(min=0))
    starts[:, 1:] = mask[:, 1:] & (last_valid >= 0) & (document_ids[:, 1:] != previous_id)
    return starts


class Gates(NamedTuple):
    """Factors of the recurrence, with resets and padding applied.

    W_t = keep_t W_{t-1} + active_t S_t, S_t = eta_t S_{t-1} - theta_t G_t, G_t taken at continues_t W_{t-1}. S is the
    momentum, and eta the share of it that a token keeps.

    The first token of a document discards the state (keep = eta = continues = 0). A masked token has no effect
    (keep = eta = 1, theta = active = 0).
    """

    keep: Float[Tensor, "batch heads time"]
    eta: Float[Tensor, "batch heads time"]
    theta: Float[Tensor, "batch heads time"]
    active: Float[Tensor, "batch heads time"] | None  # None: all tokens are active
    continues: Float[Tensor, "batch heads time"] | None  # None: a single document


def effective_gates(
    alpha: Float[Tensor, "batch heads time"],
    eta: Float[Tensor, "batch heads time"],
    theta: Float[Tensor, "batch heads time"],
    document_ids: Int[Tensor, "batch time"] | None,
    mask: Bool[Tensor, "batch time"] | None,
    dtype: torch.dtype,
) -> Gates:
    """Apply document boundaries and padding to the gates, in `dtype`."""
    keep, eta, theta = 1 - alpha.to(dtype), eta.to(dtype), theta.to(dtype)
    active = continues = None
    if mask is not None:
        valid = mask[:, None]
        keep, eta = keep.where(valid, 1), eta.where(valid, 1)
        theta, active = theta.where(valid, 0), valid.to(dtype).expand_as(theta)
    if document_ids is not None:
        same = ~document_starts(document_ids, mask)[:, None]
        keep, eta = keep.where(same, 0), eta.where(same, 0)
        continues = same.to(dtype).expand_as(theta)
    return Gates(keep, eta, theta, active, continues)
