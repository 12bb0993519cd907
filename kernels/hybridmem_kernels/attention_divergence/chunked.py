"""Attention as a policy, tile by tile: a block of queries against the keys that it can see.

With scores s_hj, L_h their log-sum-exp over all that the query sees, and C the log of the mass that the heads put on
the support together (the query itself and persistent keys are outside of it),

    w_hj = exp(s_hj - L_h - C)         p_j = sum_h w_hj         mass = exp(C) / heads

There is no quotient, and no w exceeds 1. For gradients G_j of p_j and g of the mass, with Ḡ = sum_j p_j G_j,

    v_j = G_j - Ḡ + mass g             c_h = sum_j w_hj v_j
    ds_hj = w_hj (v_j - exp(C) c_h) on the support,  -exp(s_hj - L_h) c_h outside

The forward keeps L and C; the backward recomputes each tile from them. README.md has the derivation and the cost.
"""

from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory_scan.reference import state_dtype
from .reference import FLOOR, AttentionPolicy, AttentionStats

# Scores held at once, of all rows and heads; those of one query are never cut.
TILE = 2**24  # few launches
CPU_TILE = 2**18  # stays in the cache
LEAST_REACH = 128  # queries that a window's tile may span; with many more than the window, most of it is hidden


def attention_divergence_chunked(
    policy: AttentionPolicy,
    policy_ref: AttentionPolicy,
    query_mask: Bool[Tensor, "batch queries"] | None,
    key_mask: Bool[Tensor, "batch keys"] | None,
    exclude_self: bool,
    divergence: str,
) -> AttentionStats:
    """Return the stats as the reference does."""
    tensors = (policy.q, policy.k, policy_ref.q, policy_ref.k, query_mask, key_mask)
    settings = (policy[2:], policy_ref[2:], exclude_self, divergence)
    return AttentionStats(*_AttentionDivergence.apply(*tensors, *settings))


class _Side(NamedTuple):
    """One policy, in the dtype of the sums: scaled queries, only those needed, and keys."""

    queries: Float[Tensor, "batch heads needed dim"]
    keys: Float[Tensor, "batch kv_heads keys dim"]
    persistent: Float[Tensor, "batch kv_heads persistent dim"]
    window: int | None

    @classmethod
    def of(cls, policy: AttentionPolicy, needed: Int[Tensor, " needed"], dtype: torch.dtype) -> "_Side":
        """Take the needed queries; split the keys."""
        queries = policy.q[:, :, needed].to(dtype) * policy.scale
        k, front = policy.k.to(dtype).contiguous(), policy.num_persistent
        return cls(queries, k[:, :, front:], k[:, :, :front], policy.window)


class _Stats(NamedTuple):
    """What the forward keeps of one policy; a query without support has L = inf, so that its w are 0, and C = 0."""

    log_normaliser: Float[Tensor, "batch heads needed"]  # L
    log_mass: Float[Tensor, "batch needed"]  # C

    @classmethod
    def empty(cls, side: _Side) -> "_Stats":
        """Room for every needed query."""
        normaliser = side.queries.new_empty(side.queries.shape[:3])
        return cls(normaliser, torch.empty_like(normaliser[:, 0]))

    def at(self, rows: slice) -> "_Stats":
        """Those of a block."""
        return _Stats(self.log_normaliser[:, :, rows], self.log_mass[:, rows])

    @property
    def counts(self) -> Bool[Tensor, "batch needed"]:
        """Whether there is a distribution."""
        return self.log_normaliser[:, 0].isfinite()


class _Queries(NamedTuple):
    """The queries that some row needs, and what is hidden from them."""

    needed: Int[Tensor, " needed"]  # which ones
    times: Int[Tensor, " needed"]  # where they stand among the keys
    counts: Bool[Tensor, "batch needed"] | None  # query_mask there
    key_mask: Bool[Tensor, "batch keys"] | None
    exclude_self: bool

    @classmethod
    def of(
        cls, q: Tensor, keys: int, query_mask: Tensor | None, key_mask: Tensor | None, exclude_self: bool
    ) -> "_Queries":
        """Find them."""
        if query_mask is None:
            needed, counts = torch.arange(q.shape[2], device=q.device), None
        else:
            needed = query_mask.any(0).nonzero().squeeze(1)
            counts = query_mask[:, needed]
        return cls(needed, needed + keys - q.shape[2], counts, key_mask, exclude_self)

    def hidden(self, rows: slice, band: slice, window: int | None) -> Bool[Tensor, "rows 1 block span"]:
        """Which keys of the band are not on a query's support."""
        distance = self.times[rows, None] - torch.arange(band.start, band.stop, device=self.times.device)
        hidden = distance < int(self.exclude_self)
        if window is not None:
            hidden = hidden | (distance >= window)
        if self.key_mask is None:
            return hidden[None, None]
        return (hidden | ~self.key_mask[:, None, band]).unsqueeze(1)


class _Block(NamedTuple):
    """Queries that share a tile, and the times of the first and the last of them."""

    rows: slice
    first: int
    last: int

    def band(self, window: int | None) -> slice:
        """The keys that one of them sees."""
        return slice(0 if window is None else max(0, self.first - window + 1), self.last + 1)


def _blocks(queries: _Queries, *sides: _Side) -> Iterator[_Block]:
    """Cut the needed queries so that no tile is too large and little of it is hidden."""
    columns = max(side.queries.shape[0] * side.queries.shape[1] for side in sides)
    windows = [side.window for side in sides if side.window is not None]
    window = max(windows) if len(windows) == len(sides) else None
    tile = CPU_TILE if queries.times.device.type == "cpu" else TILE
    times = queries.times.tolist()

    def block(start: int, stop: int) -> _Block:
        return _Block(slice(start, stop), times[start], times[stop - 1])

    def too_large(start: int, stop: int) -> bool:
        rows, first, last = whole = block(start, stop)
        band = whole.band(window)
        scores = columns * (rows.stop - rows.start) * (band.stop - band.start)
        return scores > tile or (window is not None and last - first >= max(window, LEAST_REACH))

    start = 0
    while start < len(times):
        longer = range(start + 2, len(times) + 1)
        stop = start + 1 + bisect_left(longer, True, key=partial(too_large, start))
        yield block(start, stop)
        start = stop


class _AttentionDivergence(torch.autograd.Function):
    """The stats; saves inputs and two numbers per query and head."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_ref: Tensor,
        k_ref: Tensor,
        query_mask: Tensor | None,
        key_mask: Tensor | None,
        settings: tuple[float, int | None, int],
        settings_ref: tuple[float, int | None, int],
        exclude_self: bool,
        divergence: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.settings = (settings, settings_ref, exclude_self, divergence)
        with torch.autocast(q.device.type, enabled=False):
            queries, side, side_ref = _prepare(q, k, q_ref, k_ref, query_mask, key_mask, *ctx.settings[:3])
            kept, kept_ref = _Stats.empty(side), _Stats.empty(side_ref)
            out = side.queries.new_zeros(4, len(q), len(queries.needed))
            for block in _blocks(queries, side, side_ref):
                p = _attend(queries, side, block, kept.at(block.rows))
                p_ref = _attend(queries, side_ref, block, kept_ref.at(block.rows))
                out[0, :, block.rows] = _divergence(divergence, *_align(p, p_ref))
                out[1, :, block.rows] = _entropy(p)
                out[2, :, block.rows] = _entropy(p_ref)
            out[0].masked_fill_(~(kept.counts & kept_ref.counts), 0)
            out[3] = (kept.log_mass.exp() / q.shape[1]).where(kept.counts, 0)
            stats = out.new_zeros(4, len(q), q.shape[2])
            stats[:, :, queries.needed] = out
        ctx.save_for_backward(q, k, q_ref, k_ref, query_mask, key_mask, *kept, *kept_ref)
        ctx.set_materialize_grads(False)
        compared, entropy, entropy_ref, mass = (x.clone() for x in stats)
        ctx.mark_non_differentiable(entropy_ref)
        return compared, entropy, entropy_ref, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, log_normaliser, log_mass, log_normaliser_ref, log_mass_ref = ctx.saved_tensors
        kept, kept_ref = _Stats(log_normaliser, log_mass), _Stats(log_normaliser_ref, log_mass_ref)
        q, k = tensors[:2]
        *settings, divergence = ctx.settings
        with torch.autocast(q.device.type, enabled=False):
            queries, side, side_ref = _prepare(*tensors, *settings)
            grad_divergence, grad_entropy, _, grad_mass = (None if x is None else x[:, queries.needed] for x in grads)
            if grad_divergence is not None:
                grad_divergence = grad_divergence.where(kept.counts & kept_ref.counts, 0)
            grad = _SideGradient.empty(side)
            for block in _blocks(queries, side, side_ref):
                rows = block.rows
                weights = _weights(queries, side, block, kept.at(rows))
                p = weights.sum(1)
                slope = torch.zeros_like(p)
                if grad_divergence is not None:
                    p_ref = _weights(queries, side_ref, block, kept_ref.at(rows)).sum(1)
                    change = _divergence_slope(divergence, *_align(p, p_ref))[..., -p.shape[-1] :]
                    slope.addcmul_(change, grad_divergence[:, rows, None])
                if grad_entropy is not None:
                    slope.addcmul_(_log(p), grad_entropy[:, rows, None], value=-1)
                slope -= torch.linalg.vecdot(p, slope).unsqueeze(-1)
                if grad_mass is not None:
                    slope += (log_mass[:, rows].exp() / q.shape[1] * grad_mass[:, rows]).unsqueeze(-1)
                _add_gradient(grad, queries, side, block, kept.at(rows), weights, slope)
            grad_q = torch.zeros_like(q)
            grad_q[:, :, queries.needed] = (grad.queries * ctx.settings[0][0]).to(q.dtype)
            grad_k = torch.cat((grad.persistent, grad.keys), dim=2).to(k.dtype)
        return grad_q, grad_k, *(None,) * 8


def _prepare(
    q: Tensor,
    k: Tensor,
    q_ref: Tensor,
    k_ref: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    settings: tuple[float, int | None, int],
    settings_ref: tuple[float, int | None, int],
    exclude_self: bool,
) -> tuple[_Queries, _Side, _Side]:
    """Which queries are needed, and both policies there."""
    policy, policy_ref = AttentionPolicy(q, k, *settings), AttentionPolicy(q_ref, k_ref, *settings_ref)
    queries = _Queries.of(q, k.shape[2] - policy.num_persistent, query_mask, key_mask, exclude_self)
    side, side_ref = (_Side.of(x, queries.needed, state_dtype(q.dtype)) for x in (policy, policy_ref))
    return queries, side, side_ref


def _attend(queries: _Queries, side: _Side, block: _Block, kept: _Stats) -> Float[Tensor, "batch block span"]:
    """p of a block; fills in what is kept of it."""
    scores = _support_scores(queries, side, block)
    top = scores.amax(-1).clamp_(min=torch.finfo(scores.dtype).min)  # finite where all keys are hidden
    weights = scores.sub_(top.unsqueeze(-1)).exp_()
    log_support = top + weights.sum(-1).log()
    log_outside = _outside_scores(queries, side, block).logsumexp(-1)
    log_normaliser = torch.logaddexp(log_support, log_outside)
    log_mass = (log_support - log_normaliser).logsumexp(1)
    counts = log_support[:, 0].isfinite()  # which keys are hidden does not depend on the head
    if queries.counts is not None:
        counts = counts & queries.counts[:, block.rows]
    kept.log_normaliser.copy_(log_normaliser.where(counts.unsqueeze(1), torch.inf))
    kept.log_mass.copy_(log_mass.where(counts, 0))
    shares = (top - kept.log_normaliser - kept.log_mass.unsqueeze(1)).exp_()
    return weights.mul_(shares.unsqueeze(-1)).sum(1)


def _weights(queries: _Queries, side: _Side, block: _Block, kept: _Stats) -> Float[Tensor, "batch heads block span"]:
    """w of a block, again."""
    offset = kept.log_normaliser + kept.log_mass.unsqueeze(1)
    return _support_scores(queries, side, block).sub_(offset.unsqueeze(-1)).exp_()


def _support_scores(queries: _Queries, side: _Side, block: _Block) -> Float[Tensor, "batch heads block span"]:
    """Scores with the keys that a block sees, -inf off the support."""
    band = block.band(side.window)
    scores = _scores(side.queries[:, :, block.rows], side.keys[:, :, band])
    return scores.masked_fill_(queries.hidden(block.rows, band, side.window), -torch.inf)


def _outside_scores(queries: _Queries, side: _Side, block: _Block) -> Float[Tensor, "batch heads block outside"]:
    """Scores with what takes part in the softmax alone: persistent keys, and last the query's own when excluded."""
    asking = side.queries[:, :, block.rows]
    scores = _scores(asking, side.persistent)
    if not queries.exclude_self:
        return scores
    times = queries.times[block.rows]
    own = torch.linalg.vecdot(_by_kv_head(asking, side.keys), side.keys[:, :, times].unsqueeze(2)).flatten(1, 2)
    if queries.key_mask is not None:
        own = own.masked_fill(~queries.key_mask[:, None, times], -torch.inf)
    return torch.cat((scores, own.unsqueeze(-1)), dim=-1)


def _by_kv_head(
    x: Float[Tensor, "batch heads block last"], keys: Float[Tensor, "batch kv_heads keys dim"]
) -> Float[Tensor, "batch kv_heads group block last"]:
    """Heads that share their keys together."""
    return x.unflatten(1, (keys.shape[1], -1))


def _scores(
    queries: Float[Tensor, "batch heads block dim"], keys: Float[Tensor, "batch kv_heads span dim"]
) -> Float[Tensor, "batch heads block span"]:
    scores = _by_kv_head(queries, keys).flatten(2, 3) @ keys.mT
    return scores.view(*queries.shape[:3], keys.shape[2])


class _SideGradient(NamedTuple):
    """The gradients of a side's tensors, summed up block by block."""

    queries: Float[Tensor, "batch heads needed dim"]
    keys: Float[Tensor, "batch kv_heads keys dim"]
    persistent: Float[Tensor, "batch kv_heads persistent dim"]

    @classmethod
    def empty(cls, side: _Side) -> "_SideGradient":
        """Zeros."""
        return cls(*(torch.zeros_like(x) for x in side[:3]))


def _add_gradient(
    grad: _SideGradient,
    queries: _Queries,
    side: _Side,
    block: _Block,
    kept: _Stats,
    weights: Float[Tensor, "batch heads block span"],
    slope: Float[Tensor, "batch block span"],
) -> None:
    """From v = `slope` to the gradients of queries and keys; overwrites `weights` with ds."""
    pulled = torch.einsum("bhqk,bqk->bhq", weights, slope)  # c
    back = pulled * kept.log_mass.exp().unsqueeze(1)
    grad_scores = weights.mul_(slope.unsqueeze(1) - back.unsqueeze(-1))
    band = block.band(side.window)
    _add_score_gradient(grad, side, block.rows, grad_scores, side.keys[:, :, band], grad.keys[:, :, band])

    outside = _outside_scores(queries, side, block)
    grad_outside = outside.sub_(kept.log_normaliser.unsqueeze(-1)).exp_().mul_(pulled.unsqueeze(-1)).neg_()
    if queries.exclude_self:
        grad_outside, grad_own = grad_outside.tensor_split((-1,), dim=-1)
        times = queries.times[block.rows]
        by_head = _by_kv_head(grad_own, side.keys)
        grad.queries[:, :, block.rows] += (by_head * side.keys[:, :, None, times]).flatten(1, 2)
        asking = _by_kv_head(side.queries[:, :, block.rows], side.keys)
        grad.keys[:, :, times] += (by_head * asking).sum(2)
    _add_score_gradient(grad, side, block.rows, grad_outside, side.persistent, grad.persistent)


def _add_score_gradient(
    grad: _SideGradient,
    side: _Side,
    rows: slice,
    grad_scores: Float[Tensor, "batch heads block span"],
    keys: Float[Tensor, "batch kv_heads span dim"],
    grad_keys: Float[Tensor, "batch kv_heads span dim"],
) -> None:
    """The gradient of `_scores`, added to queries and to `grad_keys`."""
    asking = _by_kv_head(side.queries[:, :, rows], keys).flatten(2, 3)
    by_head = _by_kv_head(grad_scores, keys).flatten(2, 3)
    grad.queries[:, :, rows] += (by_head @ keys).view_as(grad.queries[:, :, rows])
    grad_keys += by_head.mT @ asking


def _align(p: Tensor, p_ref: Tensor) -> tuple[Tensor, Tensor]:
    """Two distributions over the keys up to the same last one, zeros where the shorter band ends."""
    short = p.shape[-1] - p_ref.shape[-1]
    if short == 0:
        return p, p_ref
    return F.pad(p, (max(0, -short), 0)), F.pad(p_ref, (max(0, short), 0))


def _log(p: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The logarithm, finite at 0: there it only ever meets a factor of 0."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log_()


def _entropy(p: Float[Tensor, "batch block span"]) -> Float[Tensor, "batch block"]:
    return -torch.linalg.vecdot(p, _log(p))


def _divergence(
    name: str, p: Float[Tensor, "batch block span"], p_ref: Float[Tensor, "batch block span"]
) -> Float[Tensor, "batch block"]:
    if name == "kl":
        return torch.linalg.vecdot(p_ref, _log(p_ref) - p.clamp(min=FLOOR).log_())
    if name == "reverse_kl":
        return torch.linalg.vecdot(p, _log(p) - p_ref.clamp(min=FLOOR).log_())
    # Written in d = (p - p_ref) / (p + p_ref), no small difference of large numbers is left when the policies are near
    # each other, as they are in training: every term is about d².
    total, difference = p + p_ref, p - p_ref
    d = difference.div_(total.clamp(min=torch.finfo(p.dtype).tiny))
    edge = 1 - torch.finfo(p.dtype).eps  # at ±1 the factor before the logarithm is 0
    inner = d.clamp(-edge, edge)
    terms = torch.log1p(inner).mul_(1 + d).add_(torch.log1p(-inner).mul_(1 - d))
    return torch.linalg.vecdot(total, terms) / 4


def _divergence_slope(
    name: str, p: Float[Tensor, "batch block span"], p_ref: Float[Tensor, "batch block span"]
) -> Float[Tensor, "batch block span"]:
    """The derivative by p, up to a constant per query: p sums to 1, so constants fall out."""
    if name == "kl":
        return (p_ref / p.clamp(min=FLOOR)).where(p >= FLOOR, 0).neg_()
    if name == "reverse_kl":
        return _log(p) - p_ref.clamp(min=FLOOR).log_()
    tiny = torch.finfo(p.dtype).tiny
    return _log(2 * p / (p + p_ref).clamp_(min=tiny)).mul_(0.5)
