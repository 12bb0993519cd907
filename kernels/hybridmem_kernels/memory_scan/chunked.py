"""Chunked linear memory: exact, and computed with matrix products.

Per chunk, with the rows of decays.py (R_w = weight_rows, R_s = momentum_rows; D denotes the columns of R for the
chunk's writes), z = [W_0; S_0] stacked, and K_, Q_ the keys and queries scaled by the two state columns:

    errors  Delta = (I + N)^-1 (K_ z - V)           N = strict part of D[i-1, j] (k_i . k_j)
    output  O = Q_ z - (D * Q K^T) Delta
    state   z' = F z - [K * R_w[C]; K * R_s[C]]^T Delta

Everything independent of z is batched over all chunks of the row. Two small products per chunk remain sequential, in
the forward and in the backward. README.md has the derivation, the flops and the bytes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..decays import decay_rows, decay_rows_backward
from ..documents import effective_gates
from ..triangular import BASE, unit_lower_inverse
from .reference import MemoryState, state_dtype


def memory_scan_chunked(
    q: Float[Tensor, "batch heads time key_dim"],
    k: Float[Tensor, "batch heads time key_dim"],
    v: Float[Tensor, "batch heads time value_dim"],
    alpha: Float[Tensor, "batch heads time"],
    eta: Float[Tensor, "batch heads time"],
    theta: Float[Tensor, "batch heads time"],
    state: MemoryState,
    document_ids: Int[Tensor, "batch time"] | None,
    mask: Bool[Tensor, "batch time"] | None,
    chunk_size: int,
) -> tuple[Float[Tensor, "batch heads time value_dim"], MemoryState]:
    """Compute (out, state) as defined by the reference, for any chunk size."""
    time = q.shape[2]
    size = fitting_size(time, chunk_size)
    padding = -time % size
    if padding:
        mask = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if mask is None else mask
        mask = F.pad(mask, (0, padding))
        document_ids = None if document_ids is None else F.pad(document_ids, (0, padding))
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
        alpha, eta, theta = (F.pad(gate, (0, padding)) for gate in (alpha, eta, theta))
    gates = effective_gates(alpha, eta, theta, document_ids, mask, state_dtype(q.dtype))
    scan = torch.ops.hybridmem.memory_scan if torch.compiler.is_compiling() else _MemoryScan.apply
    with torch.autocast(q.device.type, enabled=False):
        out, weight, momentum = scan(q, k, v, *gates, *state, size)[:3]
    return out[:, :, :time] if padding else out, MemoryState(weight, momentum)


def fitting_size(time: int, most: int) -> int:
    """Return the size of chunks, which does not change the result: the one that pads the row least.

    Chunks above BASE are its multiples, since the inverse is blocked, and at least half of `most`. Compiled graphs,
    which serve rows of many lengths, take the largest.
    """
    size = min(most, time)
    if size > BASE:
        size = -(-size // BASE) * BASE
    if torch.compiler.is_compiling():
        return size
    return min(range(size, size // 2, -BASE), key=lambda size: -time % size)


def to_chunks(x: Float[Tensor, "batch heads time dim"], size: int, dtype: torch.dtype) -> Float[Tensor, "n size dim"]:
    """Split time into chunks with leading axes (chunk, batch, head), so that a chunk of all rows is contiguous."""
    chunks = x.unflatten(2, (-1, size)).permute(2, 0, 1, 3, 4)
    return chunks.to(dtype, memory_format=torch.contiguous_format).contiguous().flatten(0, 2)


def from_chunks(x: Float[Tensor, "n size dim"], batch: int, heads: int) -> Float[Tensor, "batch heads time dim"]:
    """Undo `to_chunks`."""
    return x.view(-1, batch, heads, *x.shape[1:]).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _gate_to_chunks(gate: Float[Tensor, "batch heads time"], size: int) -> Float[Tensor, "n size"]:
    return gate.unflatten(2, (-1, size)).permute(2, 0, 1, 3).contiguous().flatten(0, 2)


def _scaled_pair(
    x: Float[Tensor, "n size dim"], left: Float[Tensor, "n size"], right: Float[Tensor, "n size"]
) -> Float[Tensor, "n size pair"]:
    """Return [x * left | x * right], the factors of the weights and of the momentum."""
    pair = x.new_empty(*x.shape[:2], 2 * x.shape[-1])
    torch.mul(x, left.unsqueeze(-1), out=pair[..., : x.shape[-1]])
    torch.mul(x, right.unsqueeze(-1), out=pair[..., x.shape[-1] :])
    return pair


def _add_unscaled_pair(
    target: Float[Tensor, "n size dim"],
    grad_pair: Float[Tensor, "n size pair"],
    left: Float[Tensor, "n size"],
    right: Float[Tensor, "n size"],
) -> None:
    """Add the gradient of `_scaled_pair` with respect to x to `target`."""
    grad_left, grad_right = grad_pair.chunk(2, dim=-1)
    target.addcmul_(grad_left, left.unsqueeze(-1)).addcmul_(grad_right, right.unsqueeze(-1))


def _pair_dots(x: Float[Tensor, "n size dim"], grad_pair: Float[Tensor, "n size pair"]) -> Float[Tensor, "n size 2"]:
    """Return the gradient of `_scaled_pair` with respect to (left, right)."""
    return torch.matmul(grad_pair.unflatten(-1, (2, -1)), x.unsqueeze(-1)).squeeze(-1)


class Chunks(NamedTuple):
    """Results of the forward for the backward; n counts the chunks of all lanes, a lane being a (batch, head) pair."""

    queries: Float[Tensor, "n size key_dim"]
    keys: Float[Tensor, "n size key_dim"]
    keep: Float[Tensor, "n size"]
    eta: Float[Tensor, "n size"]
    active: Float[Tensor, "n size"] | None
    continues: Float[Tensor, "n size"] | None
    weight_rows: Float[Tensor, "n rows columns"]
    momentum_rows: Float[Tensor, "n rows columns"]
    key_products: Float[Tensor, "n size size"]
    query_products: Float[Tensor, "n size size"]
    inverse: Float[Tensor, "n size size"]  # (I + N)^-1
    read_keys: Float[Tensor, "n size pair"]  # (I + N)^-1 K_
    errors: Float[Tensor, "n size value_dim"]
    states: Float[Tensor, "n_and_lanes pair value_dim"]  # z before every chunk, and after the last one
    carry: Float[Tensor, "n 2 2"]  # F, the transition of (weight, momentum) over a chunk

    @property
    def after(self) -> Float[Tensor, "n size columns"]:
        """Return the rows after each token's write."""
        return self.weight_rows[:, 1:]

    @property
    def before(self) -> Float[Tensor, "n size columns"]:
        """Return the rows at which each token's error is taken: before its write, and after a reset."""
        before = self.weight_rows[:, :-1]
        return before if self.continues is None else before * self.continues.unsqueeze(-1)

    def written_keys(self) -> Float[Tensor, "n size pair"]:
        """Return keys scaled by the share of their write that remains at the chunk's end, in weights and momentum."""
        return _scaled_pair(self.keys, self.weight_rows[:, -1, 2:], self.momentum_rows[:, -1, 2:])


class _MemoryScan(torch.autograd.Function):
    """Scan over whole chunks; it saves a few rows of `size` per token and one state per chunk."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        results, chunks = scan_forward(*inputs)
        ctx.save_for_backward(*chunks)
        ctx.shape, ctx.dtypes = inputs[0].shape[:2], [x.dtype for x in inputs[:3]]
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tokens_and_gates, weight, momentum = scan_backward(Chunks(*ctx.saved_tensors), grads, ctx.shape, ctx.dtypes)
        return *tokens_and_gates, None, None, weight, momentum, None


def scan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    eta: Tensor,
    theta: Tensor,
    active: Tensor | None,
    continues: Tensor | None,
    weight: Tensor,
    momentum: Tensor,
    size: int,
) -> tuple[tuple[Tensor, Tensor, Tensor], Chunks]:
    """Compute (out, weight, momentum) and the tensors for the backward; the time must be a multiple of `size`."""
    batch, heads, _, key_dim = q.shape
    lanes, dtype = batch * heads, weight.dtype
    queries, keys, values = (to_chunks(x, size, dtype) for x in (q, k, v))
    keep, eta, theta = (_gate_to_chunks(gate, size) for gate in (keep, eta, theta))
    active, continues = (None if x is None else _gate_to_chunks(x, size) for x in (active, continues))
    weight_rows, momentum_rows = decay_rows(keep, eta, theta, active)
    before = weight_rows[:, :-1] if continues is None else weight_rows[:, :-1] * continues.unsqueeze(-1)

    key_products = torch.bmm(keys, keys.mT)
    inverse = unit_lower_inverse(before[..., 2:] * key_products)
    chunks = Chunks(
        queries,
        keys,
        keep,
        eta,
        active,
        continues,
        weight_rows,
        momentum_rows,
        key_products,
        query_products=torch.bmm(queries, keys.mT),
        inverse=inverse,
        read_keys=torch.bmm(inverse, _scaled_pair(keys, before[..., 0], before[..., 1])),
        errors=torch.bmm(inverse, values),
        states=keys.new_empty(len(keys) + lanes, 2 * key_dim, v.shape[-1]),
        carry=torch.stack((weight_rows[:, -1, :2], momentum_rows[:, -1, :2]), dim=1),
    )
    chunks.states[:lanes] = torch.cat((weight.flatten(0, 1), momentum.flatten(0, 1)), dim=1)
    _scan_states(chunks, lanes)
    out = torch.bmm(_scaled_pair(queries, chunks.after[..., 0], chunks.after[..., 1]), chunks.states[:-lanes])
    out.baddbmm_(chunks.query_products * chunks.after[..., 2:], chunks.errors, alpha=-1)
    last = chunks.states[-lanes:].unflatten(0, (batch, heads))
    results = (from_chunks(out, batch, heads).to(v.dtype), last[:, :, :key_dim].clone(), last[:, :, key_dim:].clone())
    return results, chunks


def scan_backward(
    chunks: Chunks, grads: Sequence[Tensor | None], shape: Sequence[int], dtypes: Sequence[torch.dtype]
) -> tuple[Tensor, ...]:
    """Compute the gradients of (q, k, v, keep, eta, theta, weight, momentum) from `grads` of (out, weight, momentum).

    `shape` is (batch, heads), and `dtypes` are the dtypes of q, k and v.
    """
    batch, heads = shape
    grad_out, grad_weight, grad_momentum = grads
    lanes, size, key_dim = batch * heads, chunks.keys.shape[1], chunks.keys.shape[2]
    with torch.autocast(chunks.keys.device.type, enabled=False):
        grad_last = chunks.states.new_zeros(batch, heads, 2, key_dim, chunks.states.shape[-1])
        for part, grad in enumerate((grad_weight, grad_momentum)):
            if grad is not None:
                grad_last[:, :, part] = grad
        if grad_out is None:
            grad_out = torch.zeros_like(chunks.errors)
        else:
            grad_out = to_chunks(grad_out, size, chunks.errors.dtype)
        grad_states, grad_errors = _scan_adjoints(chunks, grad_out, grad_last.flatten(2, 3).flatten(0, 1))
        tokens, gates = _token_gradients(chunks, grad_out, grad_states, grad_errors)
    token_grads = [from_chunks(grad, batch, heads).to(dtype) for grad, dtype in zip(tokens, dtypes, strict=True)]
    gate_grads = [from_chunks(grad.unsqueeze(-1), batch, heads).squeeze(-1) for grad in gates]
    first = grad_states[:lanes].view(batch, heads, 2, key_dim, -1)
    return *token_grads, *gate_grads, first[:, :, 0], first[:, :, 1]


def _scan_states(chunks: Chunks, lanes: int) -> None:
    """Fill in states and errors chunk by chunk, the only sequential part."""
    states, errors, written_keys = chunks.states, chunks.errors, chunks.written_keys()
    for start in range(0, len(errors), lanes):
        now, then = slice(start, start + lanes), slice(start + lanes, start + 2 * lanes)
        errors[now].baddbmm_(chunks.read_keys[now], states[now], beta=-1)
        torch.bmm(chunks.carry[now], states[now].view(lanes, 2, -1), out=states[then].view(lanes, 2, -1))
        states[then].baddbmm_(written_keys[now].mT, errors[now], alpha=-1)


def _scan_adjoints(
    chunks: Chunks, grad_out: Float[Tensor, "n size value_dim"], grad_last: Float[Tensor, "lanes pair value_dim"]
) -> tuple[Float[Tensor, "n_and_lanes pair value_dim"], Float[Tensor, "n size value_dim"]]:
    """Compute the gradients of states and errors in reverse order, after the terms that need no later state."""
    lanes, after, written_keys = len(grad_last), chunks.after, chunks.written_keys()
    grad_errors = torch.bmm((chunks.query_products * after[..., 2:]).mT, grad_out).neg_()
    grad_states = torch.empty_like(chunks.states)
    grad_states[-lanes:] = grad_last
    torch.bmm(_scaled_pair(chunks.queries, after[..., 0], after[..., 1]).mT, grad_out, out=grad_states[:-lanes])
    for start in reversed(range(0, len(grad_errors), lanes)):
        now, then = slice(start, start + lanes), slice(start + lanes, start + 2 * lanes)
        grad_errors[now].baddbmm_(written_keys[now], grad_states[then], alpha=-1)
        grad_states[now].baddbmm_(chunks.read_keys[now].mT, grad_errors[now])
        grad_states[now].view(lanes, 2, -1).baddbmm_(chunks.carry[now].mT, grad_states[then].view(lanes, 2, -1))
    return grad_states, grad_errors


def _token_gradients(
    chunks: Chunks,
    grad_out: Float[Tensor, "n size value_dim"],
    grad_states: Float[Tensor, "n_and_lanes pair value_dim"],
    grad_errors: Float[Tensor, "n size value_dim"],
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Compute the gradients of (queries, keys, values) and of (keep, eta, theta), over all chunks at once."""
    queries, keys, before, after = chunks.queries, chunks.keys, chunks.before, chunks.after
    count, lanes = len(keys), len(grad_states) - len(keys)
    starts, grad_ends = chunks.states[:-lanes], grad_states[lanes:]
    grad_residual = torch.bmm(chunks.inverse.mT, grad_errors)
    grad_read = torch.bmm(grad_residual, starts.mT)
    grad_queried = torch.bmm(grad_out, starts.mT)
    grad_written = torch.bmm(chunks.errors, grad_ends.mT).neg_()
    grad_strict = torch.bmm(grad_residual, chunks.errors.mT).neg_()
    grad_mix = torch.bmm(grad_out, chunks.errors.mT).neg_()

    grad_before = torch.empty_like(before)
    torch.mul(grad_strict, chunks.key_products, out=grad_before[..., 2:])
    grad_before[..., :2] = _pair_dots(keys, grad_read)
    if chunks.continues is not None:
        grad_before.mul_(chunks.continues.unsqueeze(-1))
    grad_weight_rows = torch.empty_like(chunks.weight_rows)
    grad_weight_rows[:, 0] = 0
    torch.mul(grad_mix, chunks.query_products, out=grad_weight_rows[:, 1:, 2:])
    grad_weight_rows[:, 1:, :2] = _pair_dots(queries, grad_queried)
    grad_weight_rows[:, :-1] += grad_before
    grad_momentum_rows = torch.zeros_like(chunks.momentum_rows)
    written_dots = _pair_dots(keys, grad_written)
    carry_dots = torch.bmm(grad_ends.view(count, 2, -1), starts.view(count, 2, -1).mT)
    for part, grad_rows in enumerate((grad_weight_rows, grad_momentum_rows)):
        grad_rows[:, -1, :2] += carry_dots[:, part]
        grad_rows[:, -1, 2:] += written_dots[..., part]

    strict_part, mix_part = grad_strict.mul_(before[..., 2:]), grad_mix.mul_(after[..., 2:])
    grad_queries = torch.bmm(mix_part, keys)
    _add_unscaled_pair(grad_queries, grad_queried, after[..., 0], after[..., 1])
    grad_keys = torch.bmm(strict_part + strict_part.mT, keys)
    grad_keys.baddbmm_(mix_part.mT, queries)
    _add_unscaled_pair(grad_keys, grad_read, before[..., 0], before[..., 1])
    _add_unscaled_pair(grad_keys, grad_written, chunks.weight_rows[:, -1, 2:], chunks.momentum_rows[:, -1, 2:])
    grad_gates = decay_rows_backward(
        chunks.keep,
        chunks.eta,
        chunks.active,
        chunks.weight_rows,
        chunks.momentum_rows,
        grad_weight_rows,
        grad_momentum_rows,
    )
    return (grad_queries, grad_keys, grad_residual.neg_()), grad_gates
