"""Token-by-token deep memory, the definition against which every other implementation is tested.

Titans (arXiv 2501.00663), equations 9-14, with an MLP M(W; x) = x + f(x), where f consists of `depth` linear maps with
SiLU in between. A token's gradient is taken at the first weights of its chunk (section 3.2). Chunks are counted from
the document's first token:

    G_t = grad_W ½‖M(W; k_t) - v_t‖²  at W = the chunk's first weights, scaled down to max_grad_norm
    S_t = eta_t S_{t-1} - theta_t G_t
    W_t = (1 - alpha_t) W_{t-1} + S_t
    o_t = M(W_t; q_t)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..documents import document_starts
from ..memory_scan.reference import state_dtype

LayerWeights = tuple[Float[Tensor, "batch heads _ _"], ...]


class MemoryMLPState(NamedTuple):
    """State of a deep memory: one matrix per layer, its momentum, and the open chunk's first weights."""

    weights: LayerWeights
    momenta: LayerWeights
    anchors: LayerWeights  # weights at which the open chunk takes its gradients
    filled: Int[Tensor, " batch"]  # number of tokens in the open chunk; 0: the next token opens a chunk

    def detach(self) -> "MemoryMLPState":
        """Detach the state from its graph, for truncated backpropagation."""
        weights, momenta, anchors = (tuple(w.detach() for w in layers) for layers in self[:3])
        return MemoryMLPState(weights, momenta, anchors, self.filled)


def initial_state(weights: Sequence[Float[Tensor, "heads _ _"]], batch: int, dtype: torch.dtype) -> MemoryMLPState:
    """Return the state of an empty memory: the learned weights, and zero momentum."""
    learned = tuple(w.to(dtype).expand(batch, *w.shape) for w in weights)
    zeros = tuple(torch.zeros_like(w) for w in learned)
    return MemoryMLPState(learned, zeros, learned, torch.zeros(batch, dtype=torch.long, device=weights[0].device))


def memory_mlp(
    weights: LayerWeights, x: Float[Tensor, "batch heads time dim"]
) -> Float[Tensor, "batch heads time dim"]:
    """Compute M(W; x), the memory's output for `x`."""
    hidden = x
    for weight in weights[:-1]:
        hidden = F.silu(hidden @ weight)
    return x + hidden @ weights[-1]


def memory_mlp_scan_reference(
    q: Float[Tensor, "batch heads time dim"],
    k: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time dim"],
    alpha: Float[Tensor, "batch heads time"],
    eta: Float[Tensor, "batch heads time"],
    theta: Float[Tensor, "batch heads time"],
    learned: Sequence[Float[Tensor, "heads _ _"]],
    state: MemoryMLPState,
    document_ids: Int[Tensor, "batch time"] | None,
    mask: Bool[Tensor, "batch time"] | None,
    chunk_size: int,
    max_grad_norm: float | None,
) -> tuple[Float[Tensor, "batch heads time dim"], MemoryMLPState]:
    """Compute (out, state) token by token, with gradients from autograd; shapes as in `memory_mlp_scan`."""
    dtype = state_dtype(q.dtype)
    fresh = initial_state(learned, q.shape[0], dtype)
    valid = torch.ones_like(alpha[:, 0], dtype=torch.bool) if mask is None else mask
    starts = torch.zeros_like(valid) if document_ids is None else document_starts(document_ids, mask)
    weights, momenta, anchors, filled = state
    outputs = []
    for t in range(q.shape[2]):
        start, counts = starts[:, t], valid[:, t]
        weights = _select(start, fresh.weights, weights)
        momenta = _select(start, fresh.momenta, momenta)
        filled = filled.where(~start, 0)
        anchors = _select(filled == 0, weights, anchors)
        gradients = _surprise(anchors, k[:, :, t, None].to(dtype), v[:, :, t, None].to(dtype), max_grad_norm)
        alpha_t, eta_t, theta_t = (gate[:, :, t, None, None].to(dtype) for gate in (alpha, eta, theta))
        written = tuple(eta_t * s - theta_t * g for s, g in zip(momenta, gradients, strict=True))
        moved = tuple((1 - alpha_t) * w + s for w, s in zip(weights, written, strict=True))
        weights, momenta = _select(counts, moved, weights), _select(counts, written, momenta)
        filled = ((filled + 1) % chunk_size).where(counts, filled)
        outputs.append(memory_mlp(weights, q[:, :, t, None].to(dtype)))
    return torch.cat(outputs, dim=2).to(v.dtype), MemoryMLPState(weights, momenta, anchors, filled)


def _surprise(anchors: LayerWeights, key: Tensor, value: Tensor, max_grad_norm: float | None) -> LayerWeights:
    with torch.enable_grad():
        anchors = tuple(w if w.requires_grad else w.detach().requires_grad_() for w in anchors)
        loss = 0.5 * (memory_mlp(anchors, key) - value).square().sum()
        gradients = torch.autograd.grad(loss, anchors, create_graph=True)
    if max_grad_norm is not None:
        norm = torch.stack([g.square().sum((-2, -1)) for g in gradients]).sum(0).sqrt()[..., None, None]
        gradients = tuple(g * (max_grad_norm / norm.clamp(min=max_grad_norm)) for g in gradients)
    return gradients


def _select(rows: Bool[Tensor, " batch"], yes: LayerWeights, no: LayerWeights) -> LayerWeights:
    return tuple(torch.where(rows[:, None, None, None], a, b) for a, b in zip(yes, no, strict=True))
