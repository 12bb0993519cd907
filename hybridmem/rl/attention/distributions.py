"""Distributions that can act as the policy, over earlier tokens or over kinds of access (see docs/policy.md).

Each row belongs to one query and sums to 1; a query without earlier tokens has a row of zeros. The queries are the
last `queries` tokens of the sequence; the keys are all tokens.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hybridmem.model.memory import ScanInputs
from hybridmem_kernels import memory_scan
from hybridmem_kernels.memory_scan import state_dtype

from .records import AttentionRecord, LayerRecord
from .targets import TARGETS

Distribution = Float[Tensor, "batch queries keys"]


def distribution(record: LayerRecord, target: str, queries: int) -> Distribution:
    """Return the distribution named by `target` at the last `queries` tokens.

    Raises:
        ValueError: The target is unknown, or the layer's variant does not support it.
    """
    if target == "attention":
        return attention(record, queries)
    if target == "allocation":
        return allocation(record, queries)
    if target == "memory":
        return memory(record, queries)
    if target == "unified":
        return unified(record, queries)
    raise ValueError(f"target={target!r} is unknown; choose one of {', '.join(TARGETS)}")


def attention(record: LayerRecord, queries: int) -> Distribution:
    """Return p_t(i) ∝ mean_h a_h,t,i over earlier tokens i < t (RAL, arXiv 2602.04884); in mac, within the segment."""
    if record.attention is not None:
        return _renormalize(attention_by_head(record.attention, queries).mean(1), queries)
    if record.segments:
        return _renormalize(_segment_weights(record, queries)[2], queries)
    raise ValueError(f"a layer of variant {record.variant} has no attention; choose target='memory'")


def allocation(record: LayerRecord, queries: int) -> Float[Tensor, "batch queries 3"]:
    """Return the shares of `KINDS`, averaged over heads.

    In mag the gate gives the shares, in mac the attention mass on each kind of key. In mal and lmm the memory has
    all of it.
    """
    if record.gate is not None:
        gate = record.gate[:, -queries:].mean(-1)
        return torch.stack((torch.zeros_like(gate), 1 - gate, gate), dim=-1)
    if record.segments:
        persistent, recalled, tokens, own = _segment_weights(record, queries)
        return torch.stack((persistent, recalled.sum(-1), tokens.sum(-1) + own), dim=-1)[:, -queries:]
    if record.memory is not None:
        alpha = record.memory.alpha[:, 0, -queries:]
        return torch.stack((torch.zeros_like(alpha), torch.ones_like(alpha), torch.zeros_like(alpha)), dim=-1)
    raise ValueError(
        f"target='allocation' needs a memory, which a layer of variant {record.variant} lacks; choose "
        "target='attention', or a layer of variant mag or mac"
    )


def memory(record: LayerRecord, queries: int) -> Distribution:
    """Return memory-implied attention m_t(j) ∝ D_tj theta_j |q_t·k_j| ‖delta_j‖ over writes j < t, averaged over heads.

    D_tj is the remaining weight of write j at token t, and delta_j the error that the write corrected. The definition
    requires memory_depth=1, where a read is a sum over writes.
    """
    if record.memory is None:
        raise ValueError(f"a layer of variant {record.variant} has no memory; choose target='attention'")
    if record.memory_depth > 1:
        raise ValueError(
            f"memory_depth={record.memory_depth} defines no memory-implied attention, because a read of a deep memory "
            "is not a sum over its writes; choose target='attention' or 'allocation', or memory_depth=1"
        )
    return _renormalize(memory_by_head(record.memory, queries).mean(1), queries)


def memory_by_head(
    inputs: ScanInputs, queries: int, own_write: bool = False
) -> Float[Tensor, "batch heads queries writes"]:
    """Return memory-implied attention of each head over writes j < t, or j <= t with `own_write`."""
    errors = surprise(inputs)
    left = _left_of_writes(inputs, queries)
    overlap = (inputs.q[:, :, -queries:] @ inputs.k.mT).to(left.dtype).abs()
    implied = left * overlap * (inputs.theta * errors).unsqueeze(-2)
    if not own_write:
        implied = implied * _earlier(implied)
    return implied / implied.sum(-1, keepdim=True).clamp(min=torch.finfo(implied.dtype).tiny)


def unified(record: LayerRecord, queries: int) -> Distribution:
    """Return the mixture of the branches' distributions, weighted by allocation.

    Persistent tokens are not earlier tokens, so their share is spread over the others. mal and lmm reach tokens through
    their memory, swa and full through their attention.
    """
    if record.memory is None:
        return attention(record, queries)
    if record.gate is None and not record.segments:
        return memory(record, queries)
    shares = allocation(record, queries)
    of_memory, of_window = shares[..., 1:2], shares[..., 2:3]
    remembered, seen = over_the_same(memory(record, queries), attention(record, queries))
    return _renormalize(of_memory * remembered + of_window * seen, queries)


def over_the_same(*sides: Float[Tensor, "batch queries _"]) -> list[Distribution]:
    """Left-pad distributions with zeros to a common number of keys, because a window's cache drops old keys."""
    keys = max(side.shape[-1] for side in sides)
    return [torch.nn.functional.pad(side, (keys - side.shape[-1], 0)) for side in sides]


def attention_by_head(record: AttentionRecord, queries: int) -> Float[Tensor, "batch heads queries keys"]:
    """Return each head's attention weights on tokens, itself included; the rest is on persistent tokens."""
    record, front = record.last_queries(queries), record.num_persistent
    time = torch.arange(record.k.shape[2] - front, device=record.q.device)
    distance = time[-record.q.shape[2] :, None] - time
    seen = distance >= 0
    if record.window is not None:
        seen = seen & (distance < record.window)
    seen = torch.nn.functional.pad(seen, (front, 0), value=True)
    if record.key_mask is not None:
        seen = seen & torch.nn.functional.pad(record.key_mask, (front, 0), value=True)[:, None, None]
    return softmax_weights(record, seen)[..., front:]


def softmax_weights(
    record: AttentionRecord, seen: Bool[Tensor, "*lead queries columns"]
) -> Float[Tensor, "batch heads queries columns"]:
    """Return the softmax weights of each head on the columns in `seen`."""
    q, k = record.q, record.k
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT).to(state_dtype(q.dtype)) * record.scale
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~seen, 0)


def segment_weights(segment: AttentionRecord) -> Float[Tensor, "batch heads queries columns"]:
    """Return each head's weights in a mac segment on [persistent tokens, recalled tokens, tokens]."""
    size, columns = segment.q.shape[2], _columns(segment)
    causal = torch.ones(size, columns, dtype=torch.bool, device=segment.q.device).tril(columns - size)
    return softmax_weights(
        segment, torch.nn.functional.pad(causal.repeat(1, 2), (segment.num_persistent, 0), value=True)
    )


def _segment_weights(record: LayerRecord, queries: int) -> tuple[Tensor, Distribution, Distribution, Tensor]:
    """Return mac's mass on persistent tokens, its weights on recalled and earlier tokens, and its weight on itself.

    The result covers the segments that contain one of the last `queries` tokens. An earlier pass may have started the
    first segment.
    """
    parts = []
    time = _columns(record.segments[0]) + sum(segment.q.shape[2] for segment in record.segments[1:])
    end = 0
    for segment in record.segments:
        size, columns, front = segment.q.shape[2], _columns(segment), segment.num_persistent
        start, end, past = end, end + columns, columns - size
        if end <= time - queries:
            continue
        persistent, recalled, tokens = segment_weights(segment).mean(1).split((front, columns, columns), dim=-1)
        around = (start, time - end)
        own = tokens.diagonal(past, dim1=-2, dim2=-1)
        recalled, tokens = (torch.nn.functional.pad(x, around) for x in (recalled, tokens.tril(past - 1)))
        parts.append((persistent.sum(-1), recalled, tokens, own))
    persistent, recalled, tokens, own = (torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))
    return persistent, recalled, tokens, own


def _columns(segment: AttentionRecord) -> int:
    """Return the number of tokens in a mac segment, whose keys contain each token twice: recalled and original."""
    return segment.num_tokens // 2


def surprise(inputs: ScanInputs) -> Float[Tensor, "batch heads time"]:
    """Return ‖delta_j‖, the norm of the error that each write corrects: the previous memory's prediction − value."""
    # A token reads after its own write, so a read with the next token's key gives the prediction before the next write.
    ahead = inputs._replace(q=inputs.k.roll(-1, dims=2))
    recalled = memory_scan(*ahead)[0][:, :, :-1]
    recalled = torch.nn.functional.pad(recalled, (0, 0, 1, 0))
    return torch.linalg.vector_norm((recalled - inputs.v).to(inputs.theta.dtype), dim=-1)


def _left_of_writes(inputs: ScanInputs, queries: int) -> Float[Tensor, "batch heads queries time"]:
    """Return D_tj = sum_{j<=l<=t} prod_{l<m<=t} (1 - alpha_m) · prod_{j<m<=l} eta_m for the last `queries` tokens t.

    Along j this is a first-order recurrence, d_j = kept_tj + eta_{j+1} d_{j+1}, which recursive doubling solves in
    log(time) passes.
    """
    time = inputs.alpha.shape[2]
    # alpha = 1 gives log(0); the floor keeps differences finite, and the weight of an erased write at zero.
    keep = torch.log1p(-inputs.alpha).clamp(min=-1e4).cumsum(-1)
    left = (keep[:, :, -queries:, None] - keep[:, :, None]).clamp(max=0).exp()
    clock = torch.arange(time, device=keep.device)
    left = left * (clock <= clock[-queries:, None])
    factor = torch.nn.functional.pad(inputs.eta[:, :, 1:], (0, 1))[:, :, None]
    reach = 1
    while reach < time:
        shifted = torch.nn.functional.pad(left[..., reach:], (0, reach))
        left = left + factor * shifted
        factor = factor * torch.nn.functional.pad(factor[..., reach:], (0, reach))
        reach *= 2
    return left


def _earlier(rows: Float[Tensor, "*lead queries keys"]) -> Float[Tensor, "queries keys"]:
    """Return 1 for keys before their query and 0 elsewhere; the queries are the last tokens of the keys."""
    queries, keys = rows.shape[-2:]
    clock = torch.arange(keys, device=rows.device)
    return (clock < clock[keys - queries :, None]).to(rows.dtype)


def _renormalize(weights: Float[Tensor, "batch rows keys"], queries: int) -> Distribution:
    """Restrict the last `queries` rows to earlier tokens and normalise them to sum 1; rows without any are zero."""
    rows = weights[:, -queries:]
    rows = rows * _earlier(rows)
    total = rows.sum(-1, keepdim=True)
    return rows / total.where(total > 0, 1)
