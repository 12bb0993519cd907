"""The backward's three passes over a slab of queries: v once for all heads, then per head c and dq, then dk.

The heads meet in v alone. So v of a slab is written down, as tiles, and every head can go its own way from there, with
its sums in registers and nothing added up by atomics.
"""

from typing import no_type_check

import triton
import triton.language as tl

from .triton_tiles import (
    divergence_slope,
    load_vectors,
    log,
    mixture,
    multiply,
    score,
    see,
    visible_tiles,
    weight_exponents,
)


@triton.jit(do_not_specialize=["queries", "keys", "persistent", "persistent_ref", "window", "window_ref", "slots"])
@no_type_check
def slopes_kernel(
    q_ptr,
    k_ptr,
    q_ref_ptr,
    k_ref_ptr,
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
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    q_ref_batch,
    q_ref_head,
    q_ref_time,
    k_ref_batch,
    k_ref_head,
    k_ref_time,
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
    DIM: tl.constexpr,
    DIM_REF: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_REF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    OPERAND: tl.constexpr,
    CHUNK_REF: tl.constexpr,
    OPERAND_REF: tl.constexpr,
    PRECISION: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """v of one tile: a block's n-th visible tile goes to the block's n-th slot."""
    slot, batch = tl.program_id(0) % slots, tl.cast(tl.program_id(1), tl.int64)
    block_of_slab = tl.program_id(0) // slots
    block = first_block + block_of_slab
    first, stop = visible_tiles(block, queries, keys, window, BLOCK_M, BLOCK_N)
    tile = first + slot
    if tile >= stop:
        return
    begin_ref, _ = visible_tiles(block, queries, keys, window_ref, BLOCK_M, BLOCK_N)
    first_row, first_column = block * BLOCK_M, tile * BLOCK_N
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows, columns = first_row + m, first_column + n
    times, inside = rows + keys - queries, rows < queries
    normaliser_ptr += batch * heads * queries
    normaliser_ref_ptr += batch * heads_ref * queries
    if key_mask_ptr is not None:
        key_mask_ptr += batch * keys
    place = batch * queries + rows
    log_mass = tl.load(log_mass_ptr + place, mask=inside, other=0.0)
    log_mass_ref = tl.load(log_mass_ref_ptr + place, mask=inside, other=0.0)
    counts = tl.load(normaliser_ptr + rows, mask=inside, other=float("inf")) < float("inf")
    compared = counts & (tl.load(normaliser_ref_ptr + rows, mask=inside, other=float("inf")) < float("inf"))
    some = tl.max(counts.to(tl.int32), 0)  # a block that nobody asks for still gets its v, without the work

    p = mixture(
        q_ptr + batch * q_batch, q_head, q_time, k_ptr + batch * k_batch, k_head, k_time, normaliser_ptr, log_mass,
        log_scale, tl.where(some > 0, heads, 0), group, first_row, queries,
        persistent + first_column, persistent + keys,
        DIM, BLOCK_DIM, BLOCK_M, BLOCK_N, CHUNK, OPERAND, PRECISION,
    )  # fmt: skip
    support, _ = see(times, columns, key_mask_ptr, keys, window, EXCLUDE_SELF)
    p = tl.where(support, p, 0.0)
    p_ref = mixture(
        q_ref_ptr + batch * q_ref_batch, q_ref_head, q_ref_time, k_ref_ptr + batch * k_ref_batch, k_ref_head,
        k_ref_time, normaliser_ref_ptr, log_mass_ref, log_scale_ref,
        tl.where((some > 0) & (tile >= begin_ref), heads_ref, 0), group_ref, first_row, queries,
        persistent_ref + first_column, persistent_ref + keys,
        DIM_REF, BLOCK_DIM_REF, BLOCK_M, BLOCK_N, CHUNK_REF, OPERAND_REF, PRECISION,
    )  # fmt: skip
    support, _ = see(times, columns, key_mask_ptr, keys, window_ref, EXCLUDE_SELF)
    p_ref = tl.where(support, p_ref, 0.0)

    mean_slope = tl.load(mean_slope_ptr + place, mask=inside, other=0.0)
    entropy = tl.load(entropy_ptr + place, mask=inside, other=0.0)
    grad_divergence = tl.where(compared, tl.load(grad_divergence_ptr + place, mask=inside, other=0.0), 0.0)
    grad_entropy = tl.load(grad_entropy_ptr + place, mask=inside, other=0.0)
    grad_mass = tl.load(grad_mass_ptr + place, mask=inside, other=0.0)
    slopes = (divergence_slope(p, p_ref, DIVERGENCE) - mean_slope[:, None]) * grad_divergence[:, None]
    slopes -= (log(p) + entropy[:, None]) * grad_entropy[:, None]
    slopes += (tl.exp2(log_mass) / heads * grad_mass)[:, None]
    place = ((batch * blocks + block_of_slab) * slots + slot) * (BLOCK_M * BLOCK_N)
    tl.store(slopes_ptr + place + m[:, None] * BLOCK_N + n[None, :], slopes)


@triton.jit
@no_type_check
def _grad_scores(scores, slopes, normaliser, log_mass, pulled, support, seen):
    """ds = w (v - exp(C) c) on the support, -exp(s - L) c on what else is seen; the last three broadcast."""
    factor = tl.where(support, slopes - tl.exp2(log_mass) * pulled, -pulled)
    exponents = weight_exponents(scores, normaliser, tl.where(support, log_mass, 0.0))
    return tl.where(seen, tl.exp2(exponents) * factor, 0.0)


@triton.jit(do_not_specialize=["queries", "keys", "persistent", "window", "slots"])
@no_type_check
def grad_queries_kernel(
    q_ptr,
    k_ptr,
    key_mask_ptr,
    normaliser_ptr,
    log_mass_ptr,
    slopes_ptr,
    pulled_ptr,
    grad_q_ptr,
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
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
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    OPERAND: tl.constexpr,
    GRAD_OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """c and dq of one head and block of queries: a sweep over its tiles for either."""
    batch, head = tl.cast(tl.program_id(1) // heads, tl.int64), tl.cast(tl.program_id(1) % heads, tl.int64)
    block_of_slab = tl.program_id(0)
    block = first_block + block_of_slab
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows = block * BLOCK_M + m
    times, inside = rows + keys - queries, rows < queries
    if key_mask_ptr is not None:
        key_mask_ptr += batch * keys
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head // group * k_head
    lane = batch * heads + head
    normaliser = tl.load(normaliser_ptr + lane * queries + rows, mask=inside, other=float("inf"))
    log_mass = tl.load(log_mass_ptr + batch * queries + rows, mask=inside, other=0.0)
    some = tl.min(normaliser, 0) < float("inf")
    first, stop = visible_tiles(block, queries, keys, window, BLOCK_M, BLOCK_N)
    stop = tl.where(some, stop, first)
    v_place = (batch * blocks + block_of_slab) * slots * (BLOCK_M * BLOCK_N)
    v_ptr = slopes_ptr + v_place + m[:, None] * BLOCK_N + n[None, :]

    pulled = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(first, stop):
        scores = log_scale * score(
            q_ptr, block * BLOCK_M, q_time, queries, k_ptr, persistent + tile * BLOCK_N, k_time, persistent + keys,
            BLOCK_M, BLOCK_N, DIM, BLOCK_DIM, CHUNK, OPERAND, PRECISION,
        )  # fmt: skip
        support, _ = see(times, tile * BLOCK_N + n, key_mask_ptr, keys, window, EXCLUDE_SELF)
        weights = tl.exp2(weight_exponents(scores, normaliser[:, None], log_mass[:, None]))
        slopes = tl.load(v_ptr + (tile - first) * (BLOCK_M * BLOCK_N))
        pulled += tl.sum(tl.where(support, weights * slopes, 0.0), 1)
    tl.store(pulled_ptr + lane * queries + rows, pulled, mask=inside)

    grad = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for tile in range(first, stop):
        scores = log_scale * score(
            q_ptr, block * BLOCK_M, q_time, queries, k_ptr, persistent + tile * BLOCK_N, k_time, persistent + keys,
            BLOCK_M, BLOCK_N, DIM, BLOCK_DIM, CHUNK, OPERAND, PRECISION,
        )  # fmt: skip
        support, seen = see(times, tile * BLOCK_N + n, key_mask_ptr, keys, window, EXCLUDE_SELF)
        slopes = tl.load(v_ptr + (tile - first) * (BLOCK_M * BLOCK_N))
        grad_scores = _grad_scores(
            scores, slopes, normaliser[:, None], log_mass[:, None], pulled[:, None], support, seen
        )
        k = load_vectors(k_ptr, persistent + tile * BLOCK_N, n, k_time, persistent + keys, 0, DIM, BLOCK_DIM)
        grad += multiply(grad_scores, k, GRAD_OPERAND, PRECISION)
    for start in range(0, tl.where(some, persistent, 0), BLOCK_N):
        scores = log_scale * score(
            q_ptr, block * BLOCK_M, q_time, queries, k_ptr, start, k_time, persistent,
            BLOCK_M, BLOCK_N, DIM, BLOCK_DIM, CHUNK, OPERAND, PRECISION,
        )  # fmt: skip
        grad_scores = tl.exp2(scores - normaliser[:, None]) * -pulled[:, None]
        grad_scores = tl.where((start + n < persistent)[None, :], grad_scores, 0.0)
        k = load_vectors(k_ptr, start, n, k_time, persistent, 0, DIM, BLOCK_DIM)
        grad += multiply(grad_scores, k, GRAD_OPERAND, PRECISION)

    dims = tl.arange(0, BLOCK_DIM)
    target = grad_q_ptr + (lane * queries + rows)[:, None] * DIM + dims[None, :]
    tl.store(target, (grad * scale).to(grad_q_ptr.dtype.element_ty), mask=inside[:, None] & (dims < DIM)[None, :])


@triton.jit(do_not_specialize=["queries", "keys", "persistent", "window", "slots", "first_tile", "persistent_tiles"])
@no_type_check
def grad_keys_kernel(
    q_ptr,
    k_ptr,
    key_mask_ptr,
    needed_blocks_ptr,
    normaliser_ptr,
    log_mass_ptr,
    slopes_ptr,
    pulled_ptr,
    grad_k_ptr,
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
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
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    OPERAND: tl.constexpr,
    GRAD_OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a slab's queries add to dk of one tile of keys, or of persistent keys; tiles are written upside down."""
    kv_heads = heads // group
    batch = tl.cast(tl.program_id(1) // kv_heads, tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    outside = tl.program_id(0) < persistent_tiles  # persistent keys: everybody sees them, no distribution has them
    tile = tl.where(outside, tl.program_id(0), first_tile + tl.program_id(0) - persistent_tiles)
    m, n, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_DIM)
    first_column = tl.where(outside, 0, persistent) + tile * BLOCK_N
    bound = tl.where(outside, persistent, persistent + keys)
    if key_mask_ptr is not None:
        key_mask_ptr += batch * keys
    q_ptr += batch * q_batch
    k_ptr += batch * k_batch + tl.cast(kv_head, tl.int64) * k_head
    normaliser_ptr += batch * heads * queries
    pulled_ptr += batch * heads * queries
    log_mass_ptr += batch * queries
    slopes_ptr += batch * blocks * slots * (BLOCK_M * BLOCK_N)

    # Queries between the tile's first key and the last one whose window still reaches its last key.
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

    grad = tl.zeros([BLOCK_N, BLOCK_DIM], tl.float32)
    for step in range(0, steps * group):
        block = begin + step % tl.maximum(steps, 1)
        head = tl.cast(kv_head * group + step // tl.maximum(steps, 1), tl.int64)
        rows = block * BLOCK_M + m
        inside = rows < queries
        q_base = q_ptr + head * q_head
        normaliser = tl.load(normaliser_ptr + head * queries + rows, mask=inside, other=float("inf"))
        pulled = tl.load(pulled_ptr + head * queries + rows, mask=inside, other=0.0)
        log_mass = tl.load(log_mass_ptr + rows, mask=inside, other=0.0)
        first, _ = visible_tiles(block, queries, keys, window, BLOCK_M, BLOCK_N)
        slot = tl.where(outside, 0, tile - first)
        v_place = tl.cast((block - first_block) * slots + slot, tl.int64) * (BLOCK_M * BLOCK_N)
        v_ptr = slopes_ptr + v_place + m[None, :] * BLOCK_N + n[:, None]
        scores = log_scale * score(
            k_ptr, first_column, k_time, bound, q_base, block * BLOCK_M, q_time, queries,
            BLOCK_N, BLOCK_M, DIM, BLOCK_DIM, CHUNK, OPERAND, PRECISION,
        )  # fmt: skip
        support, seen = see_from_keys(
            rows + offset, tile * BLOCK_N + n, key_mask_ptr, keys, window, outside, EXCLUDE_SELF
        )
        slopes = tl.load(v_ptr, mask=support, other=0.0)
        grad_scores = _grad_scores(
            scores, slopes, normaliser[None, :], log_mass[None, :], pulled[None, :], support, seen
        )
        q = load_vectors(q_base, block * BLOCK_M, m, q_time, queries, 0, DIM, BLOCK_DIM)
        grad += multiply(grad_scores, q, GRAD_OPERAND, PRECISION)

    if steps > 0:
        column = tl.cast(first_column, tl.int64) + n
        head_start = (batch * kv_heads + kv_head) * (persistent + keys)
        target = grad_k_ptr + (head_start + column)[:, None] * DIM + dims[None, :]
        mask = (column < bound)[:, None] & (dims < DIM)[None, :]
        tl.store(target, tl.load(target, mask=mask, other=0.0) + grad * scale, mask=mask)


@triton.jit
@no_type_check
def see_from_keys(times, columns, key_mask_ptr, keys, window, outside, EXCLUDE_SELF: tl.constexpr):
    """`see`, keys down and queries across; with `outside` every query sees all and none is on the support."""
    distance = times[None, :] - columns[:, None]
    seen = (distance >= 0) & (distance < window)
    if key_mask_ptr is not None:
        seen = seen & (tl.load(key_mask_ptr + columns, mask=columns < keys, other=0) != 0)[:, None]
    support = seen
    if EXCLUDE_SELF:
        support = seen & (distance > 0)
    return tl.where(outside, False, support), seen | outside
