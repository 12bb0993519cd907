"""Chunked deep memory in its dual form: matrix products instead of weights per token.

All gradients of a chunk are taken at its first weights. A single forward and backward of the MLP over the chunk's keys
therefore gives each layer's inputs a_j and output errors delta_j. With the rows of decays.py, queries are answered
layer by layer as

    X W_i = R_w[i, 0] X W_0 + R_w[i, 1] X S_0 - sum_j (D * X a^T)[i, j] theta_j delta_j

The backward recomputes each chunk from its initial state.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import Blocks, even_blocks, split_blocks
from ..decays import decay_rows, decay_rows_backward
from ..memory_scan.reference import state_dtype
from .one_chunk import ChunkInputs, LaneWeights, chunk_backward, chunk_forward
from .reference import MemoryMLPState


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
    even: bool = False,
) -> tuple[Float[Tensor, "batch heads time dim"], MemoryMLPState]:
    """Compute (out, state) as defined by the reference.

    `even` declares that every row is one document without padding and begins with a new chunk.
    """
    depth = len(learned)
    tensors = (q, k, v, alpha, eta, theta, state.filled, document_ids, mask)
    layers = (*learned, *state.weights, *state.momenta, *state.anchors)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors[:6], *layers))
    settings = (chunk_size, max_grad_norm, even, keep)
    with torch.autocast(q.device.type, enabled=False):
        if torch.compiler.is_compiling():
            out, filled, *after = torch.ops.hybridmem.memory_mlp_scan(*tensors, layers, *settings)
        else:
            out, filled, *after = _MemoryMLPScan.apply(*tensors, settings, *layers)
    weights, momenta, anchors = (tuple(after[i * depth : (i + 1) * depth]) for i in range(3))
    return out, MemoryMLPState(weights, momenta, anchors, filled)


class Inputs(NamedTuple):
    """Inputs of the scan."""

    q: Float[Tensor, "batch heads time dim"]
    k: Float[Tensor, "batch heads time dim"]
    v: Float[Tensor, "batch heads time dim"]
    alpha: Float[Tensor, "batch heads time"]
    eta: Float[Tensor, "batch heads time"]
    theta: Float[Tensor, "batch heads time"]
    filled: Int[Tensor, " batch"]
    document_ids: Int[Tensor, "batch time"] | None
    mask: Bool[Tensor, "batch time"] | None
    layers: Sequence[Float[Tensor, "*lead _ _"]]  # learned weights, then the state's weights, momenta and anchors
    chunk_size: int
    max_grad_norm: float | None
    even: bool

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of states and sums."""
        return state_dtype(self.q.dtype)

    def blocks(self) -> Blocks:
        """Split time into gradient chunks."""
        batch, _, time = self.alpha.shape
        if self.even:
            return even_blocks(batch, time, self.chunk_size, self.q.device)
        return split_blocks(time, self.chunk_size, self.filled, self.document_ids, self.mask)

    def lanes(self) -> tuple[LaneWeights, LaneWeights, LaneWeights, LaneWeights]:
        """Return (fresh, weights, momenta, anchors): a document's initial weights, then the state."""
        depth, batch = len(self.layers) // 4, len(self.q)
        learned, *state = (self.layers[i * depth : (i + 1) * depth] for i in range(4))
        fresh = tuple(w.to(self.dtype).expand(batch, *w.shape).flatten(0, 1) for w in learned)
        weights, momenta, anchors = (tuple(w.to(self.dtype).flatten(0, 1) for w in layers) for layers in state)
        return fresh, weights, momenta, anchors


class Kept(NamedTuple):
    """Tensors saved for the backward in addition to the inputs: decays, and each layer's state before every chunk."""

    weight_rows: Float[Tensor, "blocks lanes rows columns"]
    momentum_rows: Float[Tensor, "blocks lanes rows columns"]
    weights: tuple[Float[Tensor, "blocks lanes _ _"], ...]
    momenta: tuple[Float[Tensor, "blocks lanes _ _"], ...]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor]) -> "Kept":
        """Undo `flatten`."""
        depth = (len(tensors) - 2) // 2
        return cls(tensors[0], tensors[1], tuple(tensors[2 : 2 + depth]), tuple(tensors[2 + depth :]))

    def flatten(self) -> list[Tensor]:
        """Return all tensors as one list."""
        return [self.weight_rows, self.momentum_rows, *self.weights, *self.momenta]


class _MemoryMLPScan(torch.autograd.Function):
    """Autograd function of the scan; it saves its inputs, the decays and one state per chunk."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        tensors, (*settings, keep), layers = arguments[:9], arguments[9], arguments[10:]
        results, kept = scan_forward(Inputs._make((*tensors, layers, *settings)), keep)
        ctx.save_for_backward(*tensors, *layers, *kept.flatten())
        ctx.settings, ctx.layers = settings, len(layers)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(results[1])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, _: None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        layers, kept = saved[9 : 9 + ctx.layers], Kept.unflatten(saved[9 + ctx.layers :])
        inputs = Inputs._make((*saved[:9], layers, *ctx.settings))
        with torch.autocast(inputs.q.device.type, enabled=False):
            tokens, of_layers = scan_backward(inputs, kept, grad_out, grads)
        return *tokens, None, None, None, None, *of_layers


class _Gates(NamedTuple):
    """Gates in chunks; an empty slot has no effect: it keeps weights and momentum, and writes nothing."""

    keep: Float[Tensor, "blocks lanes width"]
    eta: Float[Tensor, "blocks lanes width"]
    theta: Float[Tensor, "blocks lanes width"]
    active: Float[Tensor, "blocks lanes width"]

    @classmethod
    def of(cls, inputs: Inputs, blocks: Blocks) -> "_Gates":
        """Gather the gates of a scan's inputs into chunks."""
        valid = blocks.valid.movedim(1, 0)[:, :, None]  # (blocks, batch, 1, width)
        gates = ((1 - inputs.alpha.to(inputs.dtype), 1), (inputs.eta, 1), (inputs.theta, 0))
        keep, eta, theta = (blocks.gather(x.to(inputs.dtype)).where(valid, free) for x, free in gates)
        active = valid.to(inputs.dtype).expand_as(keep)
        return cls(*(x.flatten(1, 2) for x in (keep, eta, theta, active)))


def scan_forward(inputs: Inputs, keep: bool) -> tuple[tuple[Tensor, ...], Kept]:
    """Compute (out, filled, weights …, momenta …, anchors …), and the tensors for the backward if `keep` is True."""
    batch, heads = inputs.q.shape[:2]
    blocks = inputs.blocks()
    count = blocks.times.shape[1]
    fresh, weights, momenta, anchors = inputs.lanes()
    gates = _Gates.of(inputs, blocks)
    # Step sizes are applied separately: they include the gradient bound, which is known only inside the chunk.
    rows = decay_rows(*(x.flatten(0, 1) for x in (gates.keep, gates.eta, torch.ones_like(gates.theta), gates.active)))
    weight_rows, momentum_rows = (x.unflatten(0, (count, batch * heads)) for x in rows)
    kept_count = count if keep else 0
    kept = Kept(
        weight_rows,
        momentum_rows,
        *(tuple(w.new_empty(kept_count, *w.shape) for w in layers) for layers in (weights, momenta)),
    )
    tokens = [blocks.gather(x.to(inputs.dtype)).flatten(1, 2) for x in (inputs.q, inputs.k, inputs.v)]
    outputs = []
    for n, part in enumerate(zip(*tokens, gates.theta, weight_rows, momentum_rows, strict=True)):
        if inputs.document_ids is not None:
            starts = _lanes(blocks.new_document[:, n], heads)
            weights = _select(starts, fresh, weights)
            momenta = _select(starts, tuple(torch.zeros_like(s) for s in momenta), momenta)
        anchors = weights if inputs.even else _select(_lanes(blocks.begins[:, n], heads), weights, anchors)
        if keep:
            for stored, layers in ((kept.weights, weights), (kept.momenta, momenta)):
                for into, layer in zip(stored, layers, strict=True):
                    into[n] = layer
        out, weights, momenta = chunk_forward(ChunkInputs(*part), weights, momenta, anchors, inputs.max_grad_norm)
        outputs.append(out.unflatten(0, (batch, heads)))
    if outputs:
        out, anchors = blocks.scatter(torch.stack(outputs)).to(inputs.v.dtype), [w.clone() for w in anchors]
    else:  # every token is padding
        out = torch.zeros_like(inputs.v)
        weights, momenta, anchors = ([w.clone() for w in layers] for layers in (weights, momenta, anchors))
    state = (w.unflatten(0, (batch, heads)) for layers in (weights, momenta, anchors) for w in layers)
    return (out, blocks.filled, *state), kept


def scan_backward(
    inputs: Inputs, kept: Kept, grad_out: Tensor | None, grads: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the gradients of (q, k, v, alpha, eta, theta) and of the layers from those of out and the final state."""
    batch, heads = inputs.q.shape[:2]
    blocks, depth = inputs.blocks(), len(inputs.layers) // 4
    gates = _Gates.of(inputs, blocks)
    fresh, _, _, first_anchors = inputs.lanes()
    grad_weights, grad_momenta, grad_anchors = (
        [torch.zeros_like(w) if grad is None else grad.flatten(0, 1) for w, grad in zip(fresh, part, strict=True)]
        for part in (grads[:depth], grads[depth : 2 * depth], grads[2 * depth :])
    )
    grad_fresh = [torch.zeros_like(w) for w in fresh]
    valid = blocks.valid.movedim(1, 0)[:, :, None, :, None]
    grad_out = torch.zeros_like(inputs.v) if grad_out is None else grad_out
    grad_out = blocks.gather(grad_out.to(inputs.dtype)).where(valid, 0).flatten(1, 2)
    tokens = [blocks.gather(x.to(inputs.dtype)).flatten(1, 2) for x in (inputs.q, inputs.k, inputs.v)]
    everything = ChunkInputs._make((*tokens, gates.theta, kept.weight_rows, kept.momentum_rows))
    into = ChunkInputs(*(torch.zeros_like(x) for x in everything))
    for n in reversed(range(len(grad_out))):
        weights, momenta = ([x[n] for x in layers] for layers in (kept.weights, kept.momenta))
        begins, anchors = _lanes(blocks.begins[:, n], heads), weights
        if n == 0 and not inputs.even:  # a row has tokens in a later block only if it begins that block
            anchors = _select(begins, weights, first_anchors)
        grad_weights, grad_momenta, of_anchors = chunk_backward(
            ChunkInputs(*(x[n] for x in everything)),
            weights,
            momenta,
            anchors,
            inputs.max_grad_norm,
            grad_out[n],
            grad_weights,
            grad_momenta,
            ChunkInputs(*(x[n] for x in into)),
        )
        of_anchors = [a.add_(b) for a, b in zip(of_anchors, grad_anchors, strict=True)]
        zeros = [torch.zeros_like(w) for w in of_anchors]
        grad_anchors = _select(begins, zeros, of_anchors)
        grad_weights = [a.add_(b) for a, b in zip(grad_weights, _select(begins, of_anchors, zeros), strict=True)]
        if inputs.document_ids is not None:
            starts = _lanes(blocks.new_document[:, n], heads)
            grad_fresh = [a.add_(b) for a, b in zip(grad_fresh, _select(starts, grad_weights, zeros), strict=True)]
            grad_weights, grad_momenta = (_select(starts, zeros, layers) for layers in (grad_weights, grad_momenta))
    lanes = (x.flatten(0, 1) for x in (gates.keep, gates.eta, gates.active, *kept[:2], *into[4:]))
    grad_keep, grad_eta, _ = decay_rows_backward(*lanes)
    gate_grads = (grad_keep.neg().view_as(into.theta), grad_eta.view_as(into.theta), into.theta)
    tokens_grads = [_to_time(x, blocks, inputs) for x in (*into[:3], *gate_grads)]
    states = [w.unflatten(0, (batch, heads)) for layers in (grad_weights, grad_momenta, grad_anchors) for w in layers]
    learned = [w.unflatten(0, (batch, heads)).sum(0) for w in grad_fresh]
    like = (inputs.q, inputs.k, inputs.v, inputs.alpha, inputs.eta, inputs.theta)
    return (
        [x.to(y.dtype) for x, y in zip(tokens_grads, like, strict=True)],
        [x.to(y.dtype) for x, y in zip((*learned, *states), inputs.layers, strict=True)],
    )


def _to_time(x: Float[Tensor, "blocks lanes width *dim"], blocks: Blocks, inputs: Inputs) -> Tensor:
    """Move a gradient from chunks back to time, with 0 for padding."""
    heads = inputs.q.shape[1]
    if not len(x):  # every token is padding
        return x.new_zeros(*inputs.alpha.shape, *x.shape[3:])
    grad = blocks.scatter(x.unflatten(1, (-1, heads)))
    if inputs.mask is None:
        return grad
    return grad.where(inputs.mask[:, None].view(len(inputs.q), 1, -1, *(1,) * (grad.dim() - 3)), 0)


def _lanes(rows: Bool[Tensor, " batch"], heads: int) -> Bool[Tensor, " lanes"]:
    return rows.repeat_interleave(heads)


def _select(rows: Bool[Tensor, " lanes"], yes: LaneWeights, no: LaneWeights) -> list[Tensor]:
    return [torch.where(rows[:, None, None], a, b) for a, b in zip(yes, no, strict=True)]
