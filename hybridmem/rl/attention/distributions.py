"""What can be the policy: distributions over earlier tokens, or over the ways to reach them (see docs/policy.md).

Each row belongs to one query and sums to 1; a query without an earlier token has a row of zeros. Queries are the
last `queries` tokens of the rows; keys are all tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hybridmem.model.memory import ScanInputs
from hybridmem_kernels import memory_scan
from hybridmem_kernels.memory_scan import state_dtype

from .recorder import AttentionRecord, LayerRecord
from .targets import TARGETS

Distribution = Float[Tensor, "batch queries keys"]


def distribution(record: LayerRecord, target: str, queries: int) -> Distribution:
    """The distribution of the last `queries` tokens that `target` names.

    Raises:
        ValueError: an unknown target, or one that the layer's variant has not.
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
    """p_t(i) ∝ mean_h a_h,t,i over earlier tokens i < t (RAL, arXiv 2602.04884). In mac, of the token's segment."""
    if record.attention is not None:
        return _renormalize(_token_weights(record.attention, queries), queries)
    if record.segments:
        return _renormalize(_segment_weights(record, queries)[2], queries)
    raise ValueError(f"a layer of variant {record.variant} has no attention; choose target='memory'")


def allocation(record: LayerRecord, queries: int) -> Float[Tensor, "batch queries 3"]:
    """The shares of `KINDS`: in mag the gate, in mac attention's mass on each kind of key, in mal and lmm the memory's.

    Means over heads.
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
        f"a layer of variant {record.variant} allocates nothing: it has no memory beside its attention; choose "
        "target='attention', or a layer of variant mag or mac"
    )


def memory(record: LayerRecord, queries: int) -> Distribution:
    """m_t(j) ∝ D_tj theta_j |q_t·k_j| ‖delta_j‖ over earlier writes j < t, mean over heads: memory-implied attention.

    D_tj is what is left of write j at token t, delta_j the error that it corrected. Only a memory of depth 1 reads
    out a sum over its writes.
    """
    if record.memory is None:
        raise ValueError(f"a layer of variant {record.variant} has no memory; choose target='attention'")
    if record.memory_depth > 1:
        raise ValueError(
            f"memory_depth={record.memory_depth}: what a deep memory answers is no sum over its writes, so it implies "
            "no attention; choose target='attention' or 'allocation', or memory_depth=1"
        )
    inputs = record.memory
    surprise = _surprise(inputs)
    left = _left_of_writes(inputs, queries)
    overlap = (inputs.q[:, :, -queries:] @ inputs.k.mT).to(left.dtype).abs()
    implied = left * overlap * (inputs.theta * surprise).unsqueeze(-2)
    implied = implied * _earlier(implied)
    per_head = implied / implied.sum(-1, keepdim=True).clamp(min=torch.finfo(implied.dtype).tiny)
    return _renormalize(per_head.mean(1), queries)


def unified(record: LayerRecord, queries: int) -> Distribution:
    """allocation × each branch's distribution: where a token looks, whichever way it gets there.

    Persistent tokens are no earlier tokens: their share goes to the others. mal and lmm reach tokens through their
    memory, swa and full through their attention.
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
    """Distributions over as many keys: a window's cache has dropped some that another side still has, and sees none."""
    keys = max(side.shape[-1] for side in sides)
    return [torch.nn.functional.pad(side, (keys - side.shape[-1], 0)) for side in sides]


def _token_weights(record: AttentionRecord, queries: int) -> Distribution:
    """Head-averaged softmax weights of the last queries on tokens, their own included, beside persistent ones."""
    record, front = record.last_queries(queries), record.num_persistent
    time = torch.arange(record.k.shape[2] - front, device=record.q.device)
    distance = time[-record.q.shape[2] :, None] - time
    seen = distance >= 0
    if record.window is not None:
        seen = seen & (distance < record.window)
    seen = torch.nn.functional.pad(seen, (front, 0), value=True)
    if record.key_mask is not None:
        seen = seen & torch.nn.functional.pad(record.key_mask, (front, 0), value=True)[:, None, None]
    return _head_average(record, seen)[..., front:]


def _head_average(record: AttentionRecord, seen: Tensor) -> Float[Tensor, "batch queries columns"]:
    """The mean over heads of the softmax weights on the columns that are `seen`."""
    q, k = record.q, record.k
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT).to(state_dtype(q.dtype)) * record.scale
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~seen, 0).mean(1)


def _segment_weights(record: LayerRecord, queries: int) -> tuple[Tensor, Distribution, Distribution, Tensor]:
    """mac's weights over all tokens: persistent mass, on recalled tokens, on earlier tokens, on the token itself.

    Of the segments that hold one of the last `queries` tokens. The first one may have been begun by an earlier pass.
    """
    parts = []
    time = _columns(record.segments[0]) + sum(segment.q.shape[2] for segment in record.segments[1:])
    end = 0
    for segment in record.segments:
        size, columns, front = segment.q.shape[2], _columns(segment), segment.num_persistent
        start, end, past = end, end + columns, columns - size
        if end <= time - queries:
            continue
        causal = torch.ones(size, columns, dtype=torch.bool, device=segment.q.device).tril(past)
        seen = torch.nn.functional.pad(causal.repeat(1, 2), (front, 0), value=True)
        persistent, recalled, tokens = _head_average(segment, seen).split((front, columns, columns), dim=-1)
        around = (start, time - end)
        own = tokens.diagonal(past, dim1=-2, dim2=-1)
        recalled, tokens = (torch.nn.functional.pad(x, around) for x in (recalled, tokens.tril(past - 1)))
        parts.append((persistent.sum(-1), recalled, tokens, own))
    persistent, recalled, tokens, own = (torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))
    return persistent, recalled, tokens, own


def _columns(segment: AttentionRecord) -> int:
    """Tokens of a segment of mac, each of which stands there twice: as it is recalled, and as it is."""
    return segment.num_tokens // 2


def _surprise(inputs: ScanInputs) -> Float[Tensor, "batch heads time"]:
    """‖delta_j‖, the error that each write corrects: what the memory before it answers to its key, minus its value."""
    # A token reads after its own write: asked with the next token's key, it tells what that one finds.
    ahead = inputs._replace(q=inputs.k.roll(-1, dims=2))
    recalled = memory_scan(*ahead)[0][:, :, :-1]
    recalled = torch.nn.functional.pad(recalled, (0, 0, 1, 0))
    return torch.linalg.vector_norm((recalled - inputs.v).to(inputs.theta.dtype), dim=-1)


def _left_of_writes(inputs: ScanInputs, queries: int) -> Float[Tensor, "batch heads queries time"]:
    """D_tj = sum_{j<=l<=t} prod_{l<m<=t} (1 - alpha_m) · prod_{j<m<=l} eta_m for the last `queries` tokens t.

    Along j it is a first-order recurrence, d_j = kept_tj + eta_{j+1} d_{j+1}: doubling takes log(time) passes.
    """
    time = inputs.alpha.shape[2]
    # Gates at their ends make log(0): a floor keeps differences finite and what is left of a wiped write at zero.
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
    """1 for keys before the query, of queries that are the last of the keys."""
    queries, keys = rows.shape[-2:]
    clock = torch.arange(keys, device=rows.device)
    return (clock < clock[keys - queries :, None]).to(rows.dtype)


def _renormalize(weights: Float[Tensor, "batch rows keys"], queries: int) -> Distribution:
    """The last `queries` rows over earlier tokens, summing to 1; zeros where there is none."""
    rows = weights[:, -queries:]
    rows = rows * _earlier(rows)
    total = rows.sum(-1, keepdim=True)
    return rows / total.where(total > 0, 1)
