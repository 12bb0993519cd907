"""The deep memory in its dual form: chunks of matrix products, and no weight per token.

All gradients of a chunk are taken at its first weights, so one forward and backward of the MLP over the chunk's
keys gives each layer's inputs a_j and output errors delta_j, and with the rows of decays.py

    X W_i = R_w[i, 0] X W_0 + R_w[i, 1] X S_0 - sum_j (D * X a^T)[i, j] theta_j delta_j

answers the queries layer by layer. The backward recomputes each chunk from the state it started from.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..blocks import Blocks, split_blocks
from ..decays import DecayRows
from ..memory_scan.reference import state_dtype
from .reference import MemoryMLPState, initial_state

LaneWeights = tuple[Float[Tensor, "lanes _ _"], ...]  # one matrix a layer; a lane is a (batch, head)


class ChunkInputs(NamedTuple):
    """One chunk of every lane."""

    q: Float[Tensor, "lanes width dim"]
    k: Float[Tensor, "lanes width dim"]
    v: Float[Tensor, "lanes width dim"]
    theta: Float[Tensor, "lanes width"]
    weight_rows: Float[Tensor, "lanes rows columns"]
    momentum_rows: Float[Tensor, "lanes rows columns"]


def memory_mlp_scan_chunked(
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
    """Return (out, state) as the reference does."""
    batch, heads = q.shape[:2]
    dtype = state_dtype(q.dtype)
    blocks = split_blocks(q.shape[2], chunk_size, state.filled, document_ids, mask)
    if not blocks.times.numel():  # nothing but padding
        return torch.zeros_like(v), state
    with torch.autocast(q.device.type, enabled=False):
        chunks = _cut(blocks, q, k, v, alpha, eta, theta, dtype)
        flat = [tuple(w.flatten(0, 1) for w in layers) for layers in state[:3]]
        fresh = tuple(w.flatten(0, 1) for w in initial_state(learned, batch, dtype).weights)
        weights, momenta, anchors = flat
        needs_grad = torch.is_grad_enabled() and any(
            x.requires_grad for x in (*chunks[0], *fresh, *weights, *momenta, *anchors)
        )
        outputs = []
        for n, inputs in enumerate(chunks):
            begins, new_document = (_lanes(flags[:, n], heads) for flags in (blocks.begins, blocks.new_document))
            weights = _select(new_document, fresh, weights)
            momenta = _select(new_document, tuple(torch.zeros_like(s) for s in momenta), momenta)
            anchors = _select(begins, weights, anchors)
            arguments = (inputs, weights, momenta, anchors, max_grad_norm)
            if needs_grad:
                out, weights, momenta = checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                out, weights, momenta = _chunk(*arguments)
            outputs.append(out.unflatten(0, (batch, heads)))
    weights, momenta, anchors = (
        tuple(w.unflatten(0, (batch, heads)) for w in layers) for layers in (weights, momenta, anchors)
    )
    return blocks.scatter(torch.stack(outputs)).to(v.dtype), MemoryMLPState(weights, momenta, anchors, blocks.filled)


def _cut(
    blocks: Blocks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    dtype: torch.dtype,
) -> list[ChunkInputs]:
    """Bring the tokens into chunks and unroll the decays of all of them at once."""
    valid = blocks.valid.movedim(1, 0)[:, :, None]  # (blocks, batch, 1, width)
    # A free slot changes nothing: it keeps weights and momentum, and writes nothing.
    keep, momentum, theta = (
        blocks.gather(gate.to(dtype)).where(valid, free) for gate, free in ((1 - alpha, 1), (eta, 1), (theta, 0))
    )
    count, width = keep.shape[0], keep.shape[-1]
    active = valid.to(dtype).expand_as(keep).reshape(-1, width)
    # The step sizes stay apart: they also carry the bound on the gradient, known only inside the chunk.
    rows = DecayRows.apply(keep.reshape(-1, width), momentum.reshape(-1, width), torch.ones_like(active), active)
    tokens = [blocks.gather(x.to(dtype)).flatten(1, 2) for x in (q, k, v)]
    parts = [*tokens, theta.flatten(1, 2), *(r.unflatten(0, (count, -1)) for r in rows)]
    return [ChunkInputs(*part) for part in zip(*(x.unbind(0) for x in parts), strict=True)]


def _chunk(
    inputs: ChunkInputs,
    weights: LaneWeights,
    momenta: LaneWeights,
    anchors: LaneWeights,
    max_grad_norm: float | None,
) -> tuple[Tensor, LaneWeights, LaneWeights]:
    """Read and write one chunk."""
    layer_inputs, layer_errors = _surprise(anchors, inputs.k, inputs.v)
    theta = inputs.theta
    if max_grad_norm is not None:
        squares = zip(layer_inputs, layer_errors, strict=True)
        norm = torch.stack([a.square().sum(-1) * d.square().sum(-1) for a, d in squares]).sum(0)
        # The square root has no gradient at 0, where the bound does not bind.
        theta = theta * (max_grad_norm / norm.clamp(min=max_grad_norm**2).sqrt())
    after, end = inputs.weight_rows[:, 1:], (inputs.weight_rows[:, -1], inputs.momentum_rows[:, -1])
    reach = after[..., 2:] * theta[:, None]

    x, new_weights, new_momenta = inputs.q, [], []
    for n, (weight, moment) in enumerate(zip(weights, momenta, strict=True)):
        if n:
            x = torch.nn.functional.silu(x)
        a, error = layer_inputs[n], layer_errors[n]
        read = torch.bmm(x, weight) * after[..., 0, None] + torch.bmm(x, moment) * after[..., 1, None]
        x = read - torch.bmm(torch.bmm(x, a.mT) * reach, error)
        of_weight, of_moment = (rows[:, :2, None, None] for rows in end)
        to_weight, to_moment = (a * (rows[:, 2:] * theta)[..., None] for rows in end)
        new_weights.append(of_weight[:, 0] * weight + of_weight[:, 1] * moment - torch.bmm(to_weight.mT, error))
        new_momenta.append(of_moment[:, 1] * moment - torch.bmm(to_moment.mT, error))
    return inputs.q + x, tuple(new_weights), tuple(new_momenta)


def _surprise(anchors: LaneWeights, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Each layer's inputs a_j and output errors delta_j; the gradient of its matrix is sum_j a_j delta_j^T."""
    layer_inputs, slopes, x = [k], [], k
    for anchor in anchors[:-1]:
        z = torch.bmm(x, anchor)
        gate = torch.sigmoid(z)
        x = z * gate
        slopes.append(gate + x * (1 - gate))
        layer_inputs.append(x)
    errors = [k + torch.bmm(x, anchors[-1]) - v]
    for anchor, slope in zip(reversed(anchors[1:]), reversed(slopes), strict=True):
        errors.append(torch.bmm(errors[-1], anchor.mT) * slope)
    return layer_inputs, errors[::-1]


def _lanes(rows: Bool[Tensor, " batch"], heads: int) -> Bool[Tensor, " lanes"]:
    return rows.repeat_interleave(heads)


def _select(rows: Bool[Tensor, " lanes"], yes: LaneWeights, no: LaneWeights) -> LaneWeights:
    return tuple(torch.where(rows[:, None, None], a, b) for a, b in zip(yes, no, strict=True))
