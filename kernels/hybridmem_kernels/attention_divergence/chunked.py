"""Tiled attention policies: a block of queries against the keys that it can see.

Let s_hj be the scores, L_h their log-sum-exp over all keys that the query sees, and C the log of the heads' total mass
on the support (which excludes the query itself and persistent keys). Then

    w_hj = exp(s_hj - L_h - C)         p_j = sum_h w_hj         mass = exp(C) / heads

without quotients and with all w at most 1. For gradients G_j of p_j and g of the mass, with Ḡ = sum_j p_j G_j,

    v_j = G_j - Ḡ + mass g             c_h = sum_j w_hj v_j
    ds_hj = w_hj (v_j - exp(C) c_h) on the support,  -exp(s_hj - L_h) c_h outside

The forward saves L and C, and the backward recomputes each tile from them. README.md has the derivation and the cost.
Here scores, L and C are logarithms to base 2: exp2 takes a quarter of exp's time on a CPU, and even less if the result
is close to 0, as for hidden keys.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..memory_scan.reference import state_dtype
from .autograd import Settings, compare_policies
from .chunked_blocks import LN_2, Block, Kept, Queries, Side, cut_blocks
from .chunked_divergences import align, divergence_of, divergence_slope, entropy_of, finite_log, log_sum
from .reference import AttentionPolicy, AttentionStats


def attention_divergence_chunked(
    policy: AttentionPolicy,
    policy_ref: AttentionPolicy,
    query_mask: Bool[Tensor, "batch queries"] | None,
    key_mask: Bool[Tensor, "batch keys"] | None,
    exclude_self: bool,
    divergence: str,
) -> AttentionStats:
    """Compute the stats as defined by the reference."""
    functions = ("attention_divergence", compare_forward, compare_backward)
    return compare_policies(*functions, policy, policy_ref, query_mask, key_mask, exclude_self, divergence)


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
    """Compute (divergence, entropy, entropy_ref, mass), and (L, C) of both policies at the needed queries."""
    with torch.autocast(q.device.type, enabled=False):
        queries, side, side_ref = _prepare(q, k, q_ref, k_ref, query_mask, key_mask, settings)
        kept, kept_ref = Kept.empty(side), Kept.empty(side_ref)
        out = side.queries.new_zeros(4, len(q), len(queries.needed))
        for block in cut_blocks(queries, side, side_ref):
            p = _attend(queries, side, block, kept.at(block.rows))
            p_ref = _attend(queries, side_ref, block, kept_ref.at(block.rows))
            out[0, :, block.rows] = block.join(divergence_of(settings.divergence, *align(p, p_ref)))
            out[1, :, block.rows] = block.join(entropy_of(p))
            out[2, :, block.rows] = block.join(entropy_of(p_ref))
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
    """Compute the gradients of (q, k) from the gradients of (divergence, entropy, entropy_ref, mass)."""
    own, ref = Kept(*kept[:2]), Kept(*kept[2:])
    with torch.autocast(q.device.type, enabled=False):
        queries, side, side_ref = _prepare(q, k, q_ref, k_ref, query_mask, key_mask, settings)
        grad_divergence, grad_entropy, _, grad_mass = (None if x is None else x[:, queries.needed] for x in grads)
        if grad_divergence is not None:
            grad_divergence = grad_divergence.where(own.counts & ref.counts, 0)
        grad = _SideGradient.empty(side)
        for block in cut_blocks(queries, side, side_ref):
            rows = block.rows
            weights = _weights(queries, side, block, own.at(rows))
            p = weights.sum(2)
            slope = torch.zeros_like(p)
            if grad_divergence is not None:
                p_ref = _weights(queries, side_ref, block, ref.at(rows)).sum(2)
                change = divergence_slope(settings.divergence, *align(p, p_ref))[..., -p.shape[-1] :]
                slope.addcmul_(change, block.split(grad_divergence[:, rows]).unsqueeze(-1))
            if grad_entropy is not None:
                slope.addcmul_(finite_log(p), block.split(grad_entropy[:, rows]).unsqueeze(-1), value=-1)
            slope -= torch.linalg.vecdot(p, slope).unsqueeze(-1)
            if grad_mass is not None:
                of_mass = own.log_mass[:, rows].exp2() / q.shape[1] * grad_mass[:, rows]
                slope += block.split(of_mass).unsqueeze(-1)
            _add_gradient(grad, queries, side, block, own.at(rows), weights, slope)
        grad_q = torch.zeros_like(q)
        grad_q[:, :, queries.needed] = (grad.queries * settings.scale).to(q.dtype)
        grad_k = (
            torch.cat((grad.persistent, grad.keys), dim=2).mul_(LN_2).to(k.dtype)
        )  # undo the queries' scaling to base 2
    return grad_q, grad_k


def _prepare(
    q: Tensor,
    k: Tensor,
    q_ref: Tensor,
    k_ref: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    settings: Settings,
) -> tuple[Queries, Side, Side]:
    """Return the needed queries, and both policies at them."""
    policy, policy_ref = AttentionPolicy(q, k, *settings[:3]), AttentionPolicy(q_ref, k_ref, *settings[3:6])
    queries = Queries.of(q, k.shape[2] - policy.num_persistent, query_mask, key_mask, settings.exclude_self)
    side, side_ref = (Side.of(x, queries.needed, state_dtype(q.dtype)) for x in (policy, policy_ref))
    return queries, side, side_ref


def _attend(queries: Queries, side: Side, block: Block, kept: Kept) -> Float[Tensor, "parts batch run span"]:
    """Compute p of a block, and store its L and C in `kept`."""
    scores = _support_scores(queries, side, block)
    top = scores.amax(-1).clamp_(min=torch.finfo(scores.dtype).min)  # finite even if all keys are hidden
    weights = scores.sub_(top.unsqueeze(-1)).exp2_()
    log_support = block.join(top + weights.sum(-1).log2())
    log_outside = log_sum(_outside_scores(queries, side, block), -1)
    log_normaliser = torch.logaddexp2(log_support, log_outside)
    log_mass = log_sum(log_support - log_normaliser, 1)
    counts = log_support[:, 0].isfinite()  # all heads have the same visible keys
    if queries.counts is not None:
        counts = counts & queries.counts[:, block.rows]
    kept.log_normaliser.copy_(log_normaliser.where(counts.unsqueeze(1), torch.inf))
    kept.log_mass.copy_(log_mass.where(counts, 0))
    # The order matters: L is about as large as the largest score, so C would lose precision in L + C.
    shares = (top - block.split(kept.log_normaliser)).sub_(block.split(kept.log_mass).unsqueeze(2)).exp2_()
    return weights.mul_(shares.unsqueeze(-1)).sum(2)


def _weights(queries: Queries, side: Side, block: Block, kept: Kept) -> Float[Tensor, "parts batch heads run span"]:
    """Recompute w of a block."""
    offset = block.split(kept.log_normaliser + kept.log_mass.unsqueeze(1))
    return _support_scores(queries, side, block, offset).exp2_()


def _support_scores(
    queries: Queries, side: Side, block: Block, offset: Float[Tensor, "parts batch heads run"] | None = None
) -> Float[Tensor, "parts batch heads run span"]:
    """Compute scores of the keys that a block sees, minus the offset, with -inf outside the support.

    The products are added directly to the mask minus the offset. On a CPU, separate passes for masking and subtraction
    would cost as much as the exponential.
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


def _outside_scores(queries: Queries, side: Side, block: Block) -> Float[Tensor, "batch heads block outside"]:
    """Compute scores of the keys outside the support: persistent keys, then the query's own key if excluded."""
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
    """Group heads that share their keys."""
    return x.unflatten(1, (keys.shape[1], -1))


def _scores(
    queries: Float[Tensor, "batch heads block dim"], keys: Float[Tensor, "batch kv_heads span dim"]
) -> Float[Tensor, "batch heads block span"]:
    scores = _by_kv_head(queries, keys).flatten(2, 3) @ keys.mT
    return scores.view(*queries.shape[:3], keys.shape[2])


class _SideGradient(NamedTuple):
    """Gradients of a side's tensors, accumulated block by block."""

    queries: Float[Tensor, "batch heads needed dim"]
    keys: Float[Tensor, "batch kv_heads keys dim"]
    persistent: Float[Tensor, "batch kv_heads persistent dim"]

    @classmethod
    def empty(cls, side: Side) -> "_SideGradient":
        """Create zero gradients."""
        return cls(*(torch.zeros_like(x) for x in side[:3]))


def _add_gradient(
    grad: _SideGradient,
    queries: Queries,
    side: Side,
    block: Block,
    kept: Kept,
    weights: Float[Tensor, "parts batch heads run span"],
    slope: Float[Tensor, "parts batch run span"],
) -> None:
    """Accumulate the gradients of queries and keys from v = `slope`."""
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
    side: Side,
    rows: slice,
    grad_scores: Float[Tensor, "batch heads block span"],
    keys: Float[Tensor, "batch kv_heads span dim"],
    grad_keys: Float[Tensor, "batch kv_heads span dim"],
) -> None:
    """Add the gradient of `_scores` to the queries' gradient and to `grad_keys`."""
    asking = _by_kv_head(side.queries[:, :, rows], keys).flatten(2, 3)
    by_head = _by_kv_head(grad_scores, keys).flatten(2, 3)
    grad.queries[:, :, rows] += (by_head @ keys).view_as(grad.queries[:, :, rows])
    grad_keys.flatten(0, 1).baddbmm_(
        by_head.flatten(0, 1).mT, asking.flatten(0, 1)
    )  # flatten is a view, because heads are not sliced
