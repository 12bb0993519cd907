"""Attention as a policy, tile by tile: a block of queries against the keys that it can see.

With scores s_hj, L_h their log-sum-exp over all that the query sees, and C the log of the mass that the heads put on
the support together (the query itself and persistent keys are outside of it),

    w_hj = exp(s_hj - L_h - C)         p_j = sum_h w_hj         mass = exp(C) / heads

There is no quotient, and no w exceeds 1. For gradients G_j of p_j and g of the mass, with Ḡ = sum_j p_j G_j,

    v_j = G_j - Ḡ + mass g             c_h = sum_j w_hj v_j
    ds_hj = w_hj (v_j - exp(C) c_h) on the support,  -exp(s_hj - L_h) c_h outside

The forward keeps L and C; the backward recomputes each tile from them. README.md has the derivation and the cost.
Here scores, L and C are logarithms to the base 2: exp2 takes a quarter of exp's time on a CPU, and less where the
result is 0 or next to it, as it is for hidden keys.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial
from math import log
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
LEAST_REACH = 64  # queries that share the keys of a window; with many more than the window, most of it is hidden
LN_2 = log(2)


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
    settings = (*policy[2:], *policy_ref[2:], exclude_self, divergence)
    compiling = torch.compiler.is_compiling()
    compare = torch.ops.hybridmem.attention_divergence if compiling else _AttentionDivergence.apply
    return AttentionStats(*compare(*tensors, *settings)[:4])


class _Side(NamedTuple):
    """One policy, in the dtype of the sums: queries, only those needed, scaled for scores to the base 2, and keys."""

    queries: Float[Tensor, "batch heads needed dim"]
    keys: Float[Tensor, "batch kv_heads keys dim"]
    persistent: Float[Tensor, "batch kv_heads persistent dim"]
    window: int | None

    @classmethod
    def of(cls, policy: AttentionPolicy, needed: Int[Tensor, " needed"], dtype: torch.dtype) -> "_Side":
        """Take the needed queries; split the keys."""
        queries = policy.q[:, :, _places(needed)].to(dtype) * (policy.scale / LN_2)
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
    biases: dict[int | None, "_Bias"]  # the last one of each window

    @classmethod
    def of(
        cls, q: Tensor, keys: int, query_mask: Tensor | None, key_mask: Tensor | None, exclude_self: bool
    ) -> "_Queries":
        """Find them."""
        needed = needed_queries(q, query_mask)
        counts = None if query_mask is None else query_mask[:, needed]
        return cls(needed, needed + keys - q.shape[2], counts, key_mask, exclude_self, {})

    def own(self, block: "_Block") -> slice | Int[Tensor, " block"]:
        """Where a block's queries stand among the keys; a slice where it can be one, which copies nothing."""
        return slice(block.first, block.last + 1) if block.is_run else self.times[block.rows]

    def bias(
        self, block: "_Block", window: int | None, dtype: torch.dtype
    ) -> Float[Tensor, "parts_or_1 rows_or_1 1 run span"]:
        """What the scores of a block begin with: 0 on a query's support, -inf off it."""
        first, last = block.part(0), self.biases.get(window)
        if last is not None and self.key_mask is None and last.first.lies_like(first, window):
            return last.bias
        band = first.band(window)
        distance = self.times[first.rows, None] - torch.arange(band.start, band.stop, device=self.times.device)
        hidden = distance < int(self.exclude_self)
        if window is not None:
            hidden = hidden | (distance >= window)
        hidden = hidden[None, None, None]
        if self.key_mask is not None:
            padding = torch.stack([~self.key_mask[:, part.band(window)] for part in block.each()])
            hidden = hidden | padding[:, :, None, None]
        bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        self.biases[window] = _Bias(first, bias)
        return bias


class _Block(NamedTuple):
    """Queries that are worked on at once: a few runs of the same length, each with the keys that it sees, or one part.

    A tile of theirs is (parts, batch, heads, run, span).
    """

    rows: slice  # which ones of those needed
    first: int  # the times of the first and of the last
    last: int
    parts: int = 1

    @property
    def is_run(self) -> bool:
        """Whether its queries follow each other."""
        return self.last - self.first + 1 == self.rows.stop - self.rows.start

    def part(self, n: int) -> "_Block":
        """The n-th part."""
        if self.parts == 1:
            return self
        run = (self.rows.stop - self.rows.start) // self.parts
        row, time = self.rows.start + n * run, self.first + n * run
        return _Block(slice(row, row + run), time, time + run - 1)

    def each(self) -> Iterator["_Block"]:
        """The parts."""
        return (self.part(n) for n in range(self.parts))

    def band(self, window: int | None) -> slice:
        """The keys that one of a part's queries sees."""
        return slice(0 if window is None else max(0, self.first - window + 1), self.last + 1)

    def lies_like(self, other: "_Block", window: int | None) -> bool:
        """Whether both are runs, and as long, that lie in their bands at the same place: what they see is the same."""
        mine, its = ((x.first - x.band(window).start, x.last - x.first) for x in (self, other))
        return self.is_run and other.is_run and mine == its

    def split(self, x: Float[Tensor, "*lead block"]) -> Float[Tensor, "parts *lead run"]:
        """Bring the parts to the front."""
        return x.unflatten(-1, (self.parts, -1)).movedim(-2, 0)

    def join(self, x: Float[Tensor, "parts *lead run"]) -> Float[Tensor, "*lead block"]:
        """Bring the parts back."""
        return x.movedim(0, -2).flatten(-2)


class _Bias(NamedTuple):
    """What the scores of a block begin with, and its first part."""

    first: _Block
    bias: Float[Tensor, "parts_or_1 rows_or_1 1 run span"]


def _blocks(queries: _Queries, *sides: _Side) -> Iterator[_Block]:
    """Cut the needed queries so that no tile is too large and little of it is hidden."""
    columns = max(side.queries.shape[0] * side.queries.shape[1] for side in sides)
    windows = [side.window for side in sides if side.window is not None]
    window = max(windows) if len(windows) == len(sides) else None
    reach = None if window is None else max(window // 4, LEAST_REACH)
    tile = CPU_TILE if queries.times.device.type == "cpu" else TILE
    times = queries.times.tolist()

    def block(start: int, stop: int) -> _Block:
        return _Block(slice(start, stop), times[start], times[stop - 1])

    def scores(part: _Block) -> int:
        band = part.band(window)
        return columns * (part.rows.stop - part.rows.start) * (band.stop - band.start)

    def too_large(start: int, stop: int) -> bool:
        part = block(start, stop)
        return scores(part) > tile or (reach is not None and part.last - part.first >= reach)

    start = 0
    while start < len(times):
        longer = range(start + 2, len(times) + 1)
        part = block(start, start + 1 + bisect_left(longer, True, key=partial(too_large, start)))
        run, parts = part.rows.stop - start, 1
        if window is not None and part.is_run and part.first >= window - 1:  # a whole band, as the next have it
            parts = max(1, min(tile // scores(part), (len(times) - start) // run))
            while not block(start, start + parts * run).is_run:
                parts -= 1
        yield block(start, start + parts * run)._replace(parts=parts)
        start += parts * run


class Settings(NamedTuple):
    """What is not a tensor: each policy's scale, window and persistent keys, and how they are compared."""

    scale: float
    window: int | None
    num_persistent: int
    scale_ref: float
    window_ref: int | None
    num_persistent_ref: int
    exclude_self: bool
    divergence: str


class _AttentionDivergence(torch.autograd.Function):
    """The stats; saves inputs and two numbers per query and head."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors, settings = arguments[:6], Settings(*arguments[6:])
        stats, kept = compare_forward(*tensors, settings=settings)
        ctx.save_for_backward(*tensors, *kept)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats[2])
        return stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, kept = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        return *compare_backward(*tensors, kept=kept, grads=grads, settings=ctx.settings), *(None,) * 12


def compare_forward(
    q: Tensor,
    k: Tensor,
    q_ref: Tensor,
    k_ref: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    *,
    settings: Settings,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return (divergence, entropy, entropy_ref, mass), and (L, C) of either policy at the needed queries."""
    with torch.autocast(q.device.type, enabled=False):
        queries, side, side_ref = _prepare(q, k, q_ref, k_ref, query_mask, key_mask, settings)
        kept, kept_ref = _Stats.empty(side), _Stats.empty(side_ref)
        out = side.queries.new_zeros(4, len(q), len(queries.needed))
        for block in _blocks(queries, side, side_ref):
            p = _attend(queries, side, block, kept.at(block.rows))
            p_ref = _attend(queries, side_ref, block, kept_ref.at(block.rows))
            out[0, :, block.rows] = block.join(_divergence(settings.divergence, *_align(p, p_ref)))
            out[1, :, block.rows] = block.join(_entropy(p))
            out[2, :, block.rows] = block.join(_entropy(p_ref))
        out[0].masked_fill_(~(kept.counts & kept_ref.counts), 0)
        out[3] = (kept.log_mass.exp2() / q.shape[1]).where(kept.counts, 0)
        stats = out.new_zeros(4, len(q), q.shape[2])
        stats[:, :, queries.needed] = out
    compared, entropy, entropy_ref, mass = (x.clone() for x in stats)
    return (compared, entropy, entropy_ref, mass), (*kept, *kept_ref)


def compare_backward(
    q: Tensor,
    k: Tensor,
    q_ref: Tensor,
    k_ref: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    *,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """The gradients of (q, k), from those of (divergence, entropy, entropy_ref, mass)."""
    own, ref = _Stats(*kept[:2]), _Stats(*kept[2:])
    with torch.autocast(q.device.type, enabled=False):
        queries, side, side_ref = _prepare(q, k, q_ref, k_ref, query_mask, key_mask, settings)
        grad_divergence, grad_entropy, _, grad_mass = (None if x is None else x[:, queries.needed] for x in grads)
        if grad_divergence is not None:
            grad_divergence = grad_divergence.where(own.counts & ref.counts, 0)
        grad = _SideGradient.empty(side)
        for block in _blocks(queries, side, side_ref):
            rows = block.rows
            weights = _weights(queries, side, block, own.at(rows))
            p = weights.sum(2)
            slope = torch.zeros_like(p)
            if grad_divergence is not None:
                p_ref = _weights(queries, side_ref, block, ref.at(rows)).sum(2)
                change = _divergence_slope(settings.divergence, *_align(p, p_ref))[..., -p.shape[-1] :]
                slope.addcmul_(change, block.split(grad_divergence[:, rows]).unsqueeze(-1))
            if grad_entropy is not None:
                slope.addcmul_(_log(p), block.split(grad_entropy[:, rows]).unsqueeze(-1), value=-1)
            slope -= torch.linalg.vecdot(p, slope).unsqueeze(-1)
            if grad_mass is not None:
                of_mass = own.log_mass[:, rows].exp2() / q.shape[1] * grad_mass[:, rows]
                slope += block.split(of_mass).unsqueeze(-1)
            _add_gradient(grad, queries, side, block, own.at(rows), weights, slope)
        grad_q = torch.zeros_like(q)
        grad_q[:, :, queries.needed] = (grad.queries * settings.scale).to(q.dtype)
        grad_k = torch.cat((grad.persistent, grad.keys), dim=2).mul_(LN_2).to(k.dtype)  # undoes the queries' base
    return grad_q, grad_k


def _places(needed: Int[Tensor, " needed"]) -> slice | Int[Tensor, " needed"]:
    """The same as a slice where they follow each other, which copies nothing."""
    if len(needed) == 0:
        return needed
    first, last = int(needed[0]), int(needed[-1])
    return slice(first, last + 1) if last - first + 1 == len(needed) else needed


def needed_queries(q: Tensor, query_mask: Tensor | None) -> Int[Tensor, " needed"]:
    """The queries that some row needs."""
    if query_mask is None:
        return torch.arange(q.shape[2], device=q.device)
    return query_mask.any(0).nonzero().squeeze(1)


def _prepare(
    q: Tensor,
    k: Tensor,
    q_ref: Tensor,
    k_ref: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    settings: Settings,
) -> tuple[_Queries, _Side, _Side]:
    """Which queries are needed, and both policies there."""
    policy, policy_ref = AttentionPolicy(q, k, *settings[:3]), AttentionPolicy(q_ref, k_ref, *settings[3:6])
    queries = _Queries.of(q, k.shape[2] - policy.num_persistent, query_mask, key_mask, settings.exclude_self)
    side, side_ref = (_Side.of(x, queries.needed, state_dtype(q.dtype)) for x in (policy, policy_ref))
    return queries, side, side_ref


def _attend(queries: _Queries, side: _Side, block: _Block, kept: _Stats) -> Float[Tensor, "parts batch run span"]:
    """p of a block; fills in what is kept of it."""
    scores = _support_scores(queries, side, block)
    top = scores.amax(-1).clamp_(min=torch.finfo(scores.dtype).min)  # finite where all keys are hidden
    weights = scores.sub_(top.unsqueeze(-1)).exp2_()
    log_support = block.join(top + weights.sum(-1).log2())
    log_outside = _log_sum(_outside_scores(queries, side, block), -1)
    log_normaliser = torch.logaddexp2(log_support, log_outside)
    log_mass = _log_sum(log_support - log_normaliser, 1)
    counts = log_support[:, 0].isfinite()  # which keys are hidden does not depend on the head
    if queries.counts is not None:
        counts = counts & queries.counts[:, block.rows]
    kept.log_normaliser.copy_(log_normaliser.where(counts.unsqueeze(1), torch.inf))
    kept.log_mass.copy_(log_mass.where(counts, 0))
    # In this order, for L is about as large as the largest score: C would lose its digits in L + C.
    shares = (top - block.split(kept.log_normaliser)).sub_(block.split(kept.log_mass).unsqueeze(2)).exp2_()
    return weights.mul_(shares.unsqueeze(-1)).sum(2)


def _weights(
    queries: _Queries, side: _Side, block: _Block, kept: _Stats
) -> Float[Tensor, "parts batch heads run span"]:
    """w of a block, again."""
    offset = block.split(kept.log_normaliser + kept.log_mass.unsqueeze(1))
    return _support_scores(queries, side, block, offset).exp2_()


def _support_scores(
    queries: _Queries, side: _Side, block: _Block, offset: Float[Tensor, "parts batch heads run"] | None = None
) -> Float[Tensor, "parts batch heads run span"]:
    """Scores with the keys that a block sees less the offset, -inf off the support.

    The products are added to what hides keys. On a CPU, passes that mask scores and take the offset off afterwards
    cost as much as their exponential.
    """
    bias = queries.bias(block, side.window, side.queries.dtype)
    scores = bias.new_empty(block.parts, *side.queries.shape[:2], *bias.shape[-2:])
    if offset is None:
        scores.copy_(bias)
    else:
        torch.sub(bias, offset.unsqueeze(-1), out=scores)
    for part, tile in zip(block.each(), scores, strict=True):
        keys = side.keys[:, :, part.band(side.window)].flatten(0, 1)
        asking = _by_kv_head(side.queries[:, :, part.rows], side.keys).flatten(2, 3).flatten(0, 1)
        tile.view(len(keys), -1, keys.shape[1]).baddbmm_(asking, keys.mT)
    return scores


def _outside_scores(queries: _Queries, side: _Side, block: _Block) -> Float[Tensor, "batch heads block outside"]:
    """Scores with what takes part in the softmax alone: persistent keys, and last the query's own when excluded."""
    asking = side.queries[:, :, block.rows]
    scores = _scores(asking, side.persistent)
    if not queries.exclude_self:
        return scores
    times = queries.own(block)
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
    weights: Float[Tensor, "parts batch heads run span"],
    slope: Float[Tensor, "parts batch run span"],
) -> None:
    """From v = `slope` to the gradients of queries and keys."""
    grad_scores = weights * slope.unsqueeze(2)
    pulled = grad_scores.sum(-1)  # c
    back = pulled * block.split(kept.log_mass.exp2()).unsqueeze(2)
    grad_scores.addcmul_(weights, back.unsqueeze(-1), value=-1)
    for part, tile in zip(block.each(), grad_scores, strict=True):
        band = part.band(side.window)
        _add_score_gradient(grad, side, part.rows, tile, side.keys[:, :, band], grad.keys[:, :, band])
    pulled = block.join(pulled)

    if not queries.exclude_self and side.persistent.shape[2] == 0:
        return
    outside = _outside_scores(queries, side, block)
    grad_outside = outside.sub_(kept.log_normaliser.unsqueeze(-1)).exp2_().mul_(pulled.unsqueeze(-1)).neg_()
    if queries.exclude_self:
        grad_outside, grad_own = grad_outside.tensor_split((-1,), dim=-1)
        times = queries.own(block)
        by_head = _by_kv_head(grad_own, side.keys)
        grad.queries[:, :, block.rows] += (by_head * side.keys[:, :, None, times]).flatten(1, 2)
        asking = _by_kv_head(side.queries[:, :, block.rows], side.keys)
        grad.keys[:, :, times] += (by_head * asking).sum(2)
    if side.persistent.shape[2]:
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
    grad_keys.flatten(0, 1).baddbmm_(by_head.flatten(0, 1).mT, asking.flatten(0, 1))  # a view: heads are not cut


def _align(p: Tensor, p_ref: Tensor) -> tuple[Tensor, Tensor]:
    """Two distributions over the keys up to the same last one, zeros where the shorter band ends."""
    short = p.shape[-1] - p_ref.shape[-1]
    if short == 0:
        return p, p_ref
    return F.pad(p, (max(0, -short), 0)), F.pad(p_ref, (max(0, short), 0))


def _log_sum(scores: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    """The logarithm of the sum of powers, to the base 2; -inf where there is nothing."""
    if not scores.shape[dim]:
        return scores.sum(dim).log2_()
    top = scores.amax(dim, keepdim=True)
    top = top.where(top.isfinite(), 0)  # nothing is seen: -inf, not nan
    return (scores - top).exp2_().sum(dim).log2_() + top.squeeze(dim)


def _log(p: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The logarithm, finite at 0: there it only ever meets a factor of 0."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log_()


def _entropy(p: Float[Tensor, "parts batch run span"]) -> Float[Tensor, "parts batch run"]:
    return -torch.linalg.vecdot(p, _log(p))


def _divergence(
    name: str, p: Float[Tensor, "parts batch run span"], p_ref: Float[Tensor, "parts batch run span"]
) -> Float[Tensor, "parts batch run"]:
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
    name: str, p: Float[Tensor, "parts batch run span"], p_ref: Float[Tensor, "parts batch run span"]
) -> Float[Tensor, "parts batch run span"]:
    """The derivative by p, up to a constant per query: p sums to 1, so constants fall out."""
    if name == "kl":
        return (p_ref / p.clamp(min=FLOOR)).where(p >= FLOOR, 0).neg_()
    if name == "reverse_kl":
        return _log(p) - p_ref.clamp(min=FLOOR).log_()
    tiny = torch.finfo(p.dtype).tiny
    return _log(2 * p / (p + p_ref).clamp_(min=tiny)).mul_(0.5)
