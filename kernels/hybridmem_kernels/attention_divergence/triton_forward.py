"""Forward kernels, two passes: log-sum-exps of every head and query, then the policies tile by tile.

Equation numbers refer to README.md.
"""

from typing import no_type_check

import triton
import triton.language as tl

from .triton_tiles import (
    LOWEST,
    distribution,
    divergence_slope,
    divergence_terms,
    head_vectors,
    log,
    query_rows,
    query_scores,
    row_vectors,
    see,
    visible_tiles,
)


@triton.jit
@no_type_check
def _sum_up(top, total, scores):
    """Add scores to a running sum of exponentials, represented as total · 2^top."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    return new_top, total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)


@triton.jit(do_not_specialize=["queries", "keys", "persistent", "window"])
@no_type_check
def log_sums_kernel(
    vectors,
    query_mask_ptr,
    key_mask_ptr,
    normaliser_ptr,
    log_share_ptr,
    strides,
    log_scale,
    heads,
    group,
    queries,
    keys,
    persistent,
    window,
    CUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute L of every head and query of one policy (pass 1), and the logarithm of the head's share on the support.

    Queries that are masked or have no support get L = inf and a share of 1.
    """
    block, batch = tl.program_id(0), tl.cast(tl.program_id(1) // heads, tl.int64)
    head = tl.cast(tl.program_id(1) % heads, tl.int64)
    rows, times, inside = query_rows(block, queries, keys, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    counts = inside
    if query_mask_ptr is not None:
        counts = counts & (tl.load(query_mask_ptr + batch * queries + rows, mask=counts, other=0) != 0)
    if key_mask_ptr is not None:
        key_mask_ptr += batch * keys
    q_ptr, k_ptr = head_vectors(vectors, strides, group, batch, head)
    some = tl.max(counts.to(tl.int32), 0)
    first, stop = visible_tiles(block, queries, keys, window, BLOCK_M, BLOCK_N)

    # Sums of (3) over the support
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    own = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for tile in range(first, tl.where(some > 0, stop, first)):
        scores = query_scores(
            q_ptr,
            k_ptr,
            strides,
            log_scale,
            block,
            queries,
            persistent + tile * BLOCK_N,
            persistent + keys,
            CUT,
            BLOCK_M,
            BLOCK_N,
            PRECISION,
        )
        support, seen = see(times, tile * BLOCK_N + n, key_mask_ptr, keys, window, EXCLUDE_SELF)
        top, total = _sum_up(top, total, tl.where(support, scores, float("-inf")))
        if EXCLUDE_SELF:
            own = tl.maximum(own, tl.max(tl.where(seen & (support == 0), scores, float("-inf")), 1))

    # Sums of (3) outside the support are separate, because the support's sum may be lost next to them in float32
    top_outside = tl.maximum(own, LOWEST)
    total_outside = tl.exp2(own - top_outside)
    for start in range(0, tl.where(some > 0, persistent, 0), BLOCK_N):
        scores = query_scores(
            q_ptr, k_ptr, strides, log_scale, block, queries, start, persistent, CUT, BLOCK_M, BLOCK_N, PRECISION
        )
        scores = tl.where((start + n < persistent)[None, :], scores, float("-inf"))
        top_outside, total_outside = _sum_up(top_outside, total_outside, scores)

    # (3): L, and lse_S s - L, the head's term in (4)
    higher = tl.maximum(top, top_outside)
    log_sum = tl.log2(total * tl.exp2(top - higher) + total_outside * tl.exp2(top_outside - higher))
    log_share = (top - higher) + tl.log2(total) - log_sum
    counts = counts & (total > 0)
    place = (batch * heads + head) * queries + rows
    tl.store(normaliser_ptr + place, tl.where(counts, higher + log_sum, float("inf")), mask=inside)
    tl.store(log_share_ptr + place, tl.where(counts, log_share, 0.0), mask=inside)


@triton.jit
@no_type_check
def _log_mass(normaliser_ptr, log_share_ptr, rows, heads, queries, BLOCK_M: tl.constexpr):
    """Compute C (4), and a mask of queries that have a distribution; C is 0 for the others."""
    inside = rows < queries
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for head in range(0, heads):
        share = tl.load(log_share_ptr + tl.cast(head, tl.int64) * queries + rows, mask=inside, other=0.0)
        new_top = tl.maximum(top, share)
        total = total * tl.exp2(top - new_top) + tl.exp2(share - new_top)
        top = new_top
    # All heads have the same hidden keys, so it suffices to check the first head.
    counts = tl.load(normaliser_ptr + rows, mask=inside, other=float("inf")) < float("inf")
    return tl.where(counts, top + tl.log2(total), 0.0), counts


@triton.jit(do_not_specialize=["queries", "keys", "persistent", "persistent_ref", "window", "window_ref"])
@no_type_check
def compare_kernel(
    vectors,
    vectors_ref,
    key_mask_ptr,
    normaliser_ptr,
    normaliser_ref_ptr,
    log_share_ptr,
    log_share_ref_ptr,
    log_mass_ptr,
    log_mass_ref_ptr,
    divergence_ptr,
    entropy_ptr,
    entropy_ref_ptr,
    mass_ptr,
    mean_slope_ptr,
    strides,
    strides_ref,
    log_scale,
    log_scale_ref,
    heads,
    heads_ref,
    group,
    group_ref,
    queries,
    keys,
    persistent,
    persistent_ref,
    window,
    window_ref,
    CUT: tl.constexpr,
    CUT_REF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    PRECISION: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Compare both policies tile by tile (pass 2) and compute all sums, including Σ p · slope for the backward."""
    block, batch = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    rows, times, inside = query_rows(block, queries, keys, BLOCK_M)
    row, row_ref = row_vectors(vectors, strides, batch), row_vectors(vectors_ref, strides_ref, batch)
    if key_mask_ptr is not None:
        key_mask_ptr += batch * keys
    normaliser_ptr += batch * heads * queries
    normaliser_ref_ptr += batch * heads_ref * queries
    log_share_ptr += batch * heads * queries
    log_share_ref_ptr += batch * heads_ref * queries

    # (4): C
    log_mass, counts = _log_mass(normaliser_ptr, log_share_ptr, rows, heads, queries, BLOCK_M)
    log_mass_ref, counts_ref = _log_mass(normaliser_ref_ptr, log_share_ref_ptr, rows, heads_ref, queries, BLOCK_M)

    some = tl.max((counts | counts_ref).to(tl.int32), 0)
    begin, stop = visible_tiles(block, queries, keys, window, BLOCK_M, BLOCK_N)
    begin_ref, stop = visible_tiles(block, queries, keys, window_ref, BLOCK_M, BLOCK_N)
    first = tl.minimum(begin, begin_ref)
    divergence = tl.zeros([BLOCK_M], tl.float32)
    entropy = tl.zeros([BLOCK_M], tl.float32)
    entropy_ref = tl.zeros([BLOCK_M], tl.float32)
    mean_slope = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(first, tl.where(some > 0, stop, first)):
        # (6): p and p_ref of the tile
        columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        p = distribution(
            row, strides, log_scale, tl.where(tile >= begin, heads, 0), group, normaliser_ptr, log_mass,
            key_mask_ptr, times, columns, block, tile, queries, keys, persistent, window,
            CUT, BLOCK_M, BLOCK_N, EXCLUDE_SELF, PRECISION,
        )  # fmt: skip
        p_ref = distribution(
            row_ref, strides_ref, log_scale_ref, tl.where(tile >= begin_ref, heads_ref, 0), group_ref,
            normaliser_ref_ptr, log_mass_ref, key_mask_ptr, times, columns, block, tile, queries, keys,
            persistent_ref, window_ref, CUT_REF, BLOCK_M, BLOCK_N, EXCLUDE_SELF, PRECISION,
        )  # fmt: skip
        # (8), the entropies, and Σ p G with G of (9)
        divergence += tl.sum(divergence_terms(p, p_ref, DIVERGENCE), 1)
        entropy -= tl.sum(p * log(p), 1)
        entropy_ref -= tl.sum(p_ref * log(p_ref), 1)
        mean_slope += tl.sum(p * divergence_slope(p, p_ref, DIVERGENCE), 1)

    # (7): mass = exp(C) / H
    place = batch * queries + rows
    tl.store(log_mass_ptr + place, log_mass, mask=inside)
    tl.store(log_mass_ref_ptr + place, log_mass_ref, mask=inside)
    tl.store(divergence_ptr + place, tl.where(counts & counts_ref, divergence, 0.0), mask=inside)
    tl.store(entropy_ptr + place, entropy, mask=inside)
    tl.store(entropy_ref_ptr + place, entropy_ref, mask=inside)
    tl.store(mass_ptr + place, tl.where(counts, tl.exp2(log_mass) / heads, 0.0), mask=inside)
    tl.store(mean_slope_ptr + place, mean_slope, mask=inside)
