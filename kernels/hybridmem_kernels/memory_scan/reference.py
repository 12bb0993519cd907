"""Token-by-token linear memory, the definition against which every other implementation is tested.

Titans (arXiv 2501.00663), equations 9, 10, 13 and 14, with M(W; k) = W^T k and the loss ½‖M(W; k) - v‖²:

    G_t = k_t (k_t^T W_{t-1} - v_t)^T
    S_t = eta_t S_{t-1} - theta_t G_t
    W_t = (1 - alpha_t) W_{t-1} + S_t
    o_t = W_t^T q_t
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..documents import document_starts


class MemoryState(NamedTuple):
    """State of a linear memory: its weights and their momentum, each (batch, heads, key_dim, value_dim)."""

    weight: Float[Tensor, "batch heads key_dim value_dim"]
    momentum: Float[Tensor, "batch heads key_dim value_dim"]

    def detach(self) -> "MemoryState":
        """Detach the state from its graph, for truncated backpropagation."""
        return MemoryState(self.weight.detach(), self.momentum.detach())


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states and sums: float64 for float64 inputs, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_state(
    q: Float[Tensor, "batch heads time key_dim"], v: Float[Tensor, "batch heads time value_dim"]
) -> MemoryState:
    """Return the state of an empty memory, which is zero."""
    shape = (*q.shape[:2], q.shape[-1], v.shape[-1])
    weight, momentum = (torch.zeros(shape, dtype=state_dtype(q.dtype), device=q.device) for _ in range(2))
    return MemoryState(weight, momentum)


def memory_scan_reference(
    q: Float[Tensor, "batch heads time key_dim"],
    k: Float[Tensor, "batch heads time key_dim"],
    v: Float[Tensor, "batch heads time value_dim"],
    alpha: Float[Tensor, "batch heads time"],
    eta: Float[Tensor, "batch heads time"],
    theta: Float[Tensor, "batch heads time"],
    state: MemoryState,
    document_ids: Int[Tensor, "batch time"] | None,
    mask: Bool[Tensor, "batch time"] | None,
) -> tuple[Float[Tensor, "batch heads time value_dim"], MemoryState]:
    """Return (out, state); shapes as in `memory_scan`."""
    dtype = state_dtype(q.dtype)
    valid = torch.ones_like(alpha[:, 0], dtype=torch.bool) if mask is None else mask
    starts = torch.zeros_like(valid) if document_ids is None else document_starts(document_ids, mask)
    weight, momentum = state
    outputs = []
    for t in range(q.shape[2]):
        query, key, value = (x[:, :, t, None].to(dtype) for x in (q, k, v))
        alpha_t, eta_t, theta_t = (gate[:, :, t, None, None].to(dtype) for gate in (alpha, eta, theta))
        start, counts = starts[:, t, None, None, None], valid[:, t, None, None, None]
        weight, momentum = weight.where(~start, 0), momentum.where(~start, 0)
        error = key @ weight - value
        written = eta_t * momentum - theta_t * (key.mT @ error)
        weight = torch.where(counts, (1 - alpha_t) * weight + written, weight)
        momentum = torch.where(counts, written, momentum)
        outputs.append(query @ weight)
    return torch.cat(outputs, dim=2).to(v.dtype), MemoryState(weight, momentum)
