"""Backward kernels, three passes over a slab of queries: v for all heads, then c and dq per head, then dk.

Heads interact only through v. It is stored as tiles for one slab at a time, so that every head can continue
independently, with its sums in registers and without atomics. Equation numbers refer to README.md.
"""

from typing import no_type_check

import triton
import triton.language as tl

from .triton_tiles import (
    distribution,
    divergence_slope,
    head_vectors,
    load_vectors,
    log,
    multiply,
    query_rows,
    query_scores,
    row_vectors,
    score,
    see,
    visible_tiles,
    weight_exponents,
    zero_tile,
)


@triton.jit(do_not_specialize=["queries", "keys", "persistent", "persistent_ref", "window", "window_ref", "slots"])
@no_type_check
def slopes_kernel(
    vectors,
    vectors_ref,
    key_mask_ptr,
    normaliser_ptr,
    normaliser_ref_ptr,
    log_mass_ptr,
    log_mass_ref_ptr,
    entropy_ptr,
    mean_slope_ptr,
    grad_divergence_ptr,
    grad_entropy_ptr,
    grad_mass_ptr,
    slopes_ptr,
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
    first_block,
    blocks,
    slots,
    CUT: tl.constexpr,
    CUT_REF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    PRECISION: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Compute v of one tile; a block's n-th visible tile is stored in the block's n-th slot."""
    slot, batch = tl.program_id(0) % slots, tl.cast(tl.program_id(1), tl.int64)
    block_of_slab = tl.program_id(0) // slots
    block = first_block + block_of_slab
    first, stop = visible_tiles(block, queries, keys, window, BLOCK_M, BLOCK_N)
    tile = first + slot
    if tile >= stop:
        return
    begin_ref, _ = visible_tiles(block, queries, keys, window_ref, BLOCK_M, BLOCK_N)
    rows, times, inside = query_rows(block, queries, keys, BLOCK_M)
    normaliser_ptr += batch * heads * queries
    normaliser_ref_ptr += batch * heads_ref * queries
    if key_mask_ptr is not None:
        key_mask_ptr += batch * keys
    place = batch * queries + rows
    log_mass = tl.load(log_mass_ptr + place, mask=inside, other=0.0)
    log_mass_ref = tl.load(log_mass_ref_ptr + place, mask=inside, other=0.0)
    counts = tl.load(normaliser_ptr + rows, mask=inside, other=float("inf")) < float("inf")
    compared = counts & (tl.load(normaliser_ref_ptr + rows, mask=inside, other=float("inf")) < float("inf"))
    some = tl.max(counts.to(tl.int32), 0)  # a block without unmasked queries stores v = 0 and skips the work

    # (6): p and p_ref of the tile
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    p = distribution(
        row_vectors(vectors, strides, batch), strides, log_scale, tl.where(some > 0, heads, 0), group,
        normaliser_ptr, log_mass, key_mask_ptr, times, columns, block, tile, queries, keys, persistent, window,
        CUT, BLOCK_M, BLOCK_N, EXCLUDE_SELF, PRECISION,
    )  # fmt: skip
    p_ref = distribution(
        row_vectors(vectors_ref, strides_ref, batch), strides_ref, log_scale_ref,
        tl.where((some > 0) & (tile >= begin_ref), heads_ref, 0), group_ref,
        normaliser_ref_ptr, log_mass_ref, key_mask_ptr, times, columns, block, tile, queries, keys, persistent_ref,
        window_ref, CUT_REF, BLOCK_M, BLOCK_N, EXCLUDE_SELF, PRECISION,
    )  # fmt: skip

    # (10): v = G - Ḡ + mass g, with G of (9) for divergence and entropy
    mean_slope = tl.load(mean_slope_ptr + place, mask=inside, other=0.0)
    entropy = tl.load(entropy_ptr + place, mask=inside, other=0.0)
    grad_divergence = tl.where(compared, tl.load(grad_divergence_ptr + place, mask=inside, other=0.0), 0.0)
    grad_entropy = tl.load(grad_entropy_ptr + place, mask=inside, other=0.0)
    grad_mass = tl.load(grad_mass_ptr + place, mask=inside, other=0.0)
    slopes = (divergence_slope(p, p_ref, DIVERGENCE) - mean_slope[:, None]) * grad_divergence[:, None]
    slopes -= (log(p) + entropy[:, None]) * grad_entropy[:, None]
    slopes += (tl.exp2(log_mass) / heads * grad_mass)[:, None]
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    place = ((batch * blocks + block_of_slab) * slots + slot) * (BLOCK_M * BLOCK_N)
    tl.store(slopes_ptr + place + m[:, None] * BLOCK_N + n[None, :], slopes)


@triton.jit
@no_type_check
def _grad_scores(scores, slopes, normaliser, log_mass, pulled, support, seen):
    """Compute ds (12) on the support, and do (13) on other visible keys; normaliser, log_mass and pulled broadcast."""
    factor = tl.where(support, slopes - tl.exp2(log_mass) * pulled, -pulled)
    exponents = weight_exponents(scores, normaliser, tl.where(support, log_mass, 0.0))
    return tl.where(seen, tl.exp2(exponents) * factor, 0.0)


@triton.jit(do_not_specialize=["queries", "keys", "persistent", "window", "slots"])
@no_type_check
def grad_queries_kernel(
    vectors,
    key_mask_ptr,
    normaliser_ptr,
    log_mass_ptr,
    slopes_ptr,
    pulled_ptr,
    grad_q_ptr,
    strides,
    scale,
    log_scale,
    heads,
    group,
    queries,
    keys,
    persistent,
    window,
    first_block,
    blocks,
    slots,
    CUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    GRAD_OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute c and dq of one head and block of queries, each in one pass over the block's tiles."""
    program = tl.program_id(1)
    batch, head = tl.cast(program // heads, tl.int64), tl.cast(program % heads, tl.int64)
    block_of_slab = tl.program_id(0)
    block = first_block + block_of_slab
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows, times, inside = query_rows(block, queries, keys, BLOCK_M)
    if key_mask_ptr is not None:
        key_mask_ptr += batch * keys
    q_ptr, k_ptr = head_vectors(vectors, strides, group, batch, head)
    lane = batch * heads + head
    normaliser = tl.load(normaliser_ptr + lane * queries + rows, mask=inside, other=float("inf"))
    log_mass = tl.load(log_mass_ptr + batch * queries + rows, mask=inside, other=0.0)
    some = tl.min(normaliser, 0) < float("inf")
    first, stop = visible_tiles(block, queries, keys, window, BLOCK_M, BLOCK_N)
    stop = tl.where(some, stop, first)
    v_place = (batch * blocks + block_of_slab) * slots * (BLOCK_M * BLOCK_N)
    v_ptr = slopes_ptr + v_place + m[:, None] * BLOCK_N + n[None, :]

    # (11): c = Σ w v over the support
    pulled = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(first, stop):
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
        support, _ = see(times, tile * BLOCK_N + n, key_mask_ptr, keys, window, EXCLUDE_SELF)
        weights = tl.exp2(weight_exponents(scores, normaliser[:, None], log_mass[:, None]))
        slopes = tl.load(v_ptr + (tile - first) * (BLOCK_M * BLOCK_N))
        pulled += tl.sum(tl.where(support, weights * slopes, 0.0), 1)
    tl.store(pulled_ptr + lane * queries + rows, pulled, mask=inside)

    # (12), (13), (14): dq from the keys; the query's own key is outside the support if excluded
    grad = zero_tile(BLOCK_M, CUT.width)
    for tile in range(first, stop):
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
        slopes = tl.load(v_ptr + (tile - first) * (BLOCK_M * BLOCK_N))
        grad_scores = _grad_scores(
            scores, slopes, normaliser[:, None], log_mass[:, None], pulled[:, None], support, seen
        )
        k = load_vectors(
            k_ptr, persistent + tile * BLOCK_N, n, strides.k_time, persistent + keys, 0, CUT.dim, CUT.width
        )
        grad += multiply(grad_scores, k, GRAD_OPERAND, PRECISION)

    # (13), (14): dq from persistent keys
    for start in range(0, tl.where(some, persistent, 0), BLOCK_N):
        scores = query_scores(
            q_ptr, k_ptr, strides, log_scale, block, queries, start, persistent, CUT, BLOCK_M, BLOCK_N, PRECISION
        )
        grad_scores = tl.exp2(scores - normaliser[:, None]) * -pulled[:, None]
        grad_scores = tl.where((start + n < persistent)[None, :], grad_scores, 0.0)
        k = load_vectors(k_ptr, start, n, strides.k_time, persistent, 0, CUT.dim, CUT.width)
        grad += multiply(grad_scores, k, GRAD_OPERAND, PRECISION)

    dims = tl.arange(0, CUT.width)
    target = grad_q_ptr + (lane * queries + rows)[:, None] * CUT.dim + dims[None, :]
    tl.store(target, (grad * scale).to(grad_q_ptr.dtype.element_ty), mask=inside[:, None] & (dims < CUT.dim)[None, :])


@triton.jit(do_not_specialize=["queries", "keys", "persistent", "window", "slots", "first_tile", "persistent_tiles"])
@no_type_check
def grad_keys_kernel(
    vectors,
    key_mask_ptr,
    needed_blocks_ptr,
    normaliser_ptr,
    log_mass_ptr,
    slopes_ptr,
    pulled_ptr,
    grad_k_ptr,
    strides,
    scale,
    log_scale,
    heads,
    group,
    queries,
    keys,
    persistent,
    window,
    first_block,
    blocks,
    slots,
    first_tile,
    persistent_tiles,
    CUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    GRAD_OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a slab's contribution to dk of one tile of keys, or of persistent keys; tiles are transposed."""
    kv_heads = heads // group
    batch = tl.cast(tl.program_id(1) // kv_heads, tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    outside = (
        tl.program_id(0) < persistent_tiles
    )  # persistent keys are visible to all queries and outside every distribution
    tile = tl.where(outside, tl.program_id(0), first_tile + tl.program_id(0) - persistent_tiles)
    m, n, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, CUT.width)
    first_column = tl.where(outside, 0, persistent) + tile * BLOCK_N
    bound = tl.where(outside, persistent, persistent + keys)
    if key_mask_ptr is not None:
        key_mask_ptr += batch * keys
    q_ptr = vectors.q_ptr + batch * strides.q_batch
    k_ptr = vectors.k_ptr + (batch * strides.k_batch + tl.cast(kv_head, tl.int64) * strides.k_head)
    normaliser_ptr += batch * heads * queries
    pulled_ptr += batch * heads * queries
    log_mass_ptr += batch * queries
    slopes_ptr += batch * blocks * slots * (BLOCK_M * BLOCK_N)

    # Queries from the tile's first key to the last query whose window includes the tile's last key.
    offset = keys - queries
    begin = tl.where(outside, 0, tl.maximum(tile * BLOCK_N - offset, 0) // BLOCK_M)
    last_row = tl.minimum(tile * BLOCK_N + BLOCK_N + window - 2 - offset, queries - 1)
    stop = tl.where(outside, first_block + blocks, (tl.maximum(last_row + 1, 0) + BLOCK_M - 1) // BLOCK_M)
    begin = tl.maximum(begin, first_block)
    stop = tl.minimum(stop, first_block + blocks)
    if needed_blocks_ptr is not None:
        begin = tl.maximum(begin, tl.load(needed_blocks_ptr + batch * 2))
        stop = tl.minimum(stop, tl.load(needed_blocks_ptr + batch * 2 + 1))
    steps = tl.maximum(stop - begin, 0)

    # (12), (13), (15): dk from every block of queries and every head that shares the key
    grad = zero_tile(BLOCK_N, CUT.width)
    for step in range(0, steps * group):
        block = begin + step % tl.maximum(steps, 1)
        head = tl.cast(kv_head * group + step // tl.maximum(steps, 1), tl.int64)
        rows = block * BLOCK_M + m
        inside = rows < queries
        q_base = q_ptr + head * strides.q_head
        normaliser = tl.load(normaliser_ptr + head * queries + rows, mask=inside, other=float("inf"))
        pulled = tl.load(pulled_ptr + head * queries + rows, mask=inside, other=0.0)
        log_mass = tl.load(log_mass_ptr + rows, mask=inside, other=0.0)
        first, _ = visible_tiles(block, queries, keys, window, BLOCK_M, BLOCK_N)
        slot = tl.where(outside, 0, tile - first)
        v_place = tl.cast((block - first_block) * slots + slot, tl.int64) * (BLOCK_M * BLOCK_N)
        v_ptr = slopes_ptr + v_place + m[None, :] * BLOCK_N + n[:, None]
        scores = log_scale * score(
            k_ptr,
            first_column,
            strides.k_time,
            bound,
            q_base,
            block * BLOCK_M,
            strides.q_time,
            queries,
            BLOCK_N,
            BLOCK_M,
            CUT,
            PRECISION,
        )
        support, seen = see_from_keys(
            rows + offset, tile * BLOCK_N + n, key_mask_ptr, keys, window, outside, EXCLUDE_SELF
        )
        slopes = tl.load(v_ptr, mask=support, other=0.0)
        grad_scores = _grad_scores(
            scores, slopes, normaliser[None, :], log_mass[None, :], pulled[None, :], support, seen
        )
        q = load_vectors(q_base, block * BLOCK_M, m, strides.q_time, queries, 0, CUT.dim, CUT.width)
        grad += multiply(grad_scores, q, GRAD_OPERAND, PRECISION)

    # Slabs are added in launch order
    if steps > 0:
        column = tl.cast(first_column, tl.int64) + n
        head_start = (batch * kv_heads + kv_head) * (persistent + keys)
        target = grad_k_ptr + (head_start + column)[:, None] * CUT.dim + dims[None, :]
        mask = (column < bound)[:, None] & (dims < CUT.dim)[None, :]
        tl.store(target, tl.load(target, mask=mask, other=0.0) + grad * scale, mask=mask)


@triton.jit
@no_type_check
def see_from_keys(times, columns, key_mask_ptr, keys, window, outside, EXCLUDE_SELF: tl.constexpr):
    """Compute `see` for transposed tiles; with `outside`, everything is visible and nothing is on the support."""
    distance = times[None, :] - columns[:, None]
    seen = (distance >= 0) & (distance < window)
    if key_mask_ptr is not None:
        seen = seen & (tl.load(key_mask_ptr + columns, mask=columns < keys, other=0) != 0)[:, None]
    support = seen
    if EXCLUDE_SELF:
        support = seen & (distance > 0)
    return tl.where(outside, False, support), seen | outside
