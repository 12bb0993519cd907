"""Forward kernels of the linear memory: decays, products and inverses of every chunk, then states, then outputs.

Equation numbers refer to README.md.
"""

from typing import no_type_check

import triton
import triton.language as tl

from .triton_tiles import (
    ACTIVE,
    CONTINUES,
    COUNTS,
    ETA,
    KEEP,
    MOMENTUM_FOUND,
    MOMENTUM_KEPT,
    MOMENTUM_LEFT,
    THETA,
    WEIGHT_FOUND,
    WEIGHT_LEFT,
    WRITE_LEFT,
    WRITE_MOVING,
    copy_state,
    dot,
    lane_start,
    load_carry,
    load_column,
    load_rows,
    load_square,
    load_tile,
    store_column,
    store_square,
    store_tile,
    through_state,
    unit_lower_inverse,
)


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def decay_kernel(
    gates_ptr,
    rows_ptr,
    moving_ptr,
    columns_ptr,
    lanes,
    time,
    chunks,
    SIZE: tl.constexpr,
    KEEP_MOVING: tl.constexpr,
):
    """Run the recurrences (4) and (5) for one chunk, for its writes and its first state.

    Each write has its own recurrence, so threads need no communication.
    """
    unit = tl.program_id(0).to(tl.int64)
    lane, start = unit // chunks, unit % chunks * SIZE
    j = tl.arange(0, SIZE)
    gate_ptr, gate = gates_ptr + lane * time + start, tl.cast(lanes, tl.int64) * time
    rows_ptr += unit * (SIZE + 1) * SIZE + j
    moving_ptr += unit * (SIZE + 1) * SIZE + j
    moving = tl.zeros((SIZE,), tl.float32)
    left = tl.zeros((SIZE,), tl.float32)
    weight_found, momentum_found = left, left
    weight_left, momentum_left, momentum_kept = left, left, left
    from_weight, from_momentum, kept = (
        tl.full((), 1.0, tl.float32),
        tl.full((), 0.0, tl.float32),
        tl.full((), 1.0, tl.float32),
    )
    for i in range(SIZE):
        tl.store(rows_ptr + i * SIZE, left)
        if KEEP_MOVING:
            tl.store(moving_ptr + i * SIZE, moving)
        # Padding after the row's end has no effect.
        inside = start + i < time
        keep = tl.load(gate_ptr + KEEP * gate + i, mask=inside, other=1.0)
        eta = tl.load(gate_ptr + ETA * gate + i, mask=inside, other=1.0)
        theta = tl.load(gate_ptr + THETA * gate + i, mask=inside, other=0.0)
        active = tl.load(gate_ptr + ACTIVE * gate + i, mask=inside, other=0.0)
        continues = tl.load(gate_ptr + CONTINUES * gate + i, mask=inside, other=1.0)
        # a_{i-1} and p_{i-1} of K̄ (7)
        weight_found = tl.where(j == i, continues * from_weight, weight_found)
        momentum_found = tl.where(j == i, continues * from_momentum, momentum_found)
        # (4), (5): columns of the writes, then of the chunk's first state
        moving = tl.where(j == i, theta, eta * moving)
        left = keep * left + active * moving
        kept = eta * kept
        from_weight = keep * from_weight
        from_momentum = keep * from_momentum + active * kept
        weight_left = tl.where(j == i, from_weight, weight_left)
        momentum_left = tl.where(j == i, from_momentum, momentum_left)
        momentum_kept = tl.where(j == i, kept, momentum_kept)
    # a, p, e of Q̄ (8) and F (9); D_C and R_s[C] of K̂ (9)
    tl.store(rows_ptr + SIZE * SIZE, left)
    store_column(columns_ptr, unit, WEIGHT_LEFT, weight_left, SIZE)
    store_column(columns_ptr, unit, MOMENTUM_LEFT, momentum_left, SIZE)
    store_column(columns_ptr, unit, MOMENTUM_KEPT, momentum_kept, SIZE)
    store_column(columns_ptr, unit, WEIGHT_FOUND, weight_found, SIZE)
    store_column(columns_ptr, unit, MOMENTUM_FOUND, momentum_found, SIZE)
    store_column(columns_ptr, unit, WRITE_LEFT, left, SIZE)
    store_column(columns_ptr, unit, WRITE_MOVING, moving, SIZE)


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def chunk_kernel(
    q_ptr,
    k_ptr,
    gates_ptr,
    rows_ptr,
    inverse_ptr,
    mix_ptr,
    lanes,
    heads,
    time,
    chunks,
    key_batch,
    key_head,
    key_time,
    KEY_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Compute (I + N)⁻¹ and D ⊙ Q Kᵀ of one chunk, which do not depend on its state."""
    unit = tl.program_id(0).to(tl.int64)
    lane, start = unit // chunks, unit % chunks * SIZE
    i = tl.arange(0, SIZE)
    key_products = tl.zeros((SIZE, SIZE), tl.float32)
    query_products = tl.zeros((SIZE, SIZE), tl.float32)
    q_ptr = lane_start(q_ptr, lane, heads, key_batch, key_head) + start * key_time
    k_ptr = lane_start(k_ptr, lane, heads, key_batch, key_head) + start * key_time
    for low in range(0, KEY_DIM, KEY_BLOCK):
        dims = low + tl.arange(0, KEY_BLOCK)
        k = load_tile(k_ptr, i, dims, key_time, time - start, KEY_DIM)
        q = load_tile(q_ptr, i, dims, key_time, time - start, KEY_DIM)
        key_products += dot(k, tl.trans(k), PRECISION)
        query_products += dot(q, tl.trans(k), PRECISION)
    # D ⊙ Q Kᵀ of (8)
    store_square(mix_ptr, unit, load_rows(rows_ptr, unit, 1, SIZE) * query_products, SIZE)
    # (6): N, and (I + N)⁻¹ of (7)
    continues_ptr = gates_ptr + (CONTINUES * lanes + lane) * time + start
    continues = tl.load(continues_ptr + i, mask=start + i < time, other=1.0)
    strict = continues[:, None] * load_rows(rows_ptr, unit, 0, SIZE) * key_products
    store_square(inverse_ptr, unit, unit_lower_inverse(strict, SIZE, EXACT), SIZE)


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def scan_kernel(
    k_ptr,
    v_ptr,
    inverse_ptr,
    columns_ptr,
    weight_ptr,
    momentum_ptr,
    states_ptr,
    errors_ptr,
    last_weight_ptr,
    last_momentum_ptr,
    heads,
    time,
    chunks,
    key_batch,
    key_head,
    key_time,
    value_batch,
    value_head,
    value_time,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the state before every chunk, the errors within it, and the last state, for a block of value columns.

    Value columns are independent. A program's state is too large for registers, so it passes through the L2 cache: the
    outputs need every chunk's state in memory anyway. Barriers order a program's own stores and loads.
    """
    lane = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, SIZE), tl.arange(0, KEY_BLOCK)
    values = tl.program_id(1) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    STATE: tl.constexpr = KEY_DIM * VALUE_DIM
    k_ptr = lane_start(k_ptr, lane, heads, key_batch, key_head)
    v_ptr = lane_start(v_ptr, lane, heads, value_batch, value_head)
    z_ptr = states_ptr + lane * chunks * 2 * STATE
    copy_state(weight_ptr + lane * STATE, momentum_ptr + lane * STATE, z_ptr, values, KEY_DIM, VALUE_DIM, KEY_BLOCK)
    tl.debug_barrier()

    for chunk in range(chunks):
        unit = lane * chunks + chunk
        tokens = time - chunk * SIZE
        # (7): Δ = (I + N)⁻¹ (K̄ z - V)
        from_weight, from_momentum = through_state(
            k_ptr, key_time, tokens, z_ptr, values, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, SIZE, PRECISION
        )
        residual = load_column(columns_ptr, unit, WEIGHT_FOUND, SIZE)[:, None] * from_weight
        residual += load_column(columns_ptr, unit, MOMENTUM_FOUND, SIZE)[:, None] * from_momentum
        residual -= load_tile(v_ptr, i, values, value_time, tokens, VALUE_DIM)
        errors = dot(load_square(inverse_ptr, unit, SIZE), residual, PRECISION)
        store_tile(errors_ptr + unit * SIZE * VALUE_DIM, i, values, VALUE_DIM, SIZE, VALUE_DIM, errors)

        # (9): z' = F z - K̂ᵀ Δ
        weight_left, momentum_left, momentum_kept = load_carry(columns_ptr, unit, SIZE)
        left = load_column(columns_ptr, unit, WRITE_LEFT, SIZE)[:, None] * errors
        moving = load_column(columns_ptr, unit, WRITE_MOVING, SIZE)[:, None] * errors
        is_last = chunk + 1 == chunks
        next_weight_ptr = tl.where(is_last, last_weight_ptr + lane * STATE, z_ptr + 2 * STATE)
        next_momentum_ptr = tl.where(is_last, last_momentum_ptr + lane * STATE, z_ptr + 3 * STATE)
        for low in range(0, KEY_DIM, KEY_BLOCK):
            k = tl.trans(load_tile(k_ptr, i, low + d, key_time, tokens, KEY_DIM))
            weight = load_tile(z_ptr, low + d, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
            momentum = load_tile(z_ptr + STATE, low + d, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
            weight = weight_left * weight + momentum_left * momentum - dot(k, left, PRECISION)
            store_tile(next_weight_ptr, low + d, values, VALUE_DIM, KEY_DIM, VALUE_DIM, weight)
            momentum = momentum_kept * momentum - dot(k, moving, PRECISION)
            store_tile(next_momentum_ptr, low + d, values, VALUE_DIM, KEY_DIM, VALUE_DIM, momentum)
        tl.debug_barrier()
        z_ptr += 2 * STATE
        k_ptr += tl.cast(key_time, tl.int64) * SIZE
        v_ptr += tl.cast(value_time, tl.int64) * SIZE


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def output_kernel(
    q_ptr,
    mix_ptr,
    columns_ptr,
    states_ptr,
    errors_ptr,
    out_ptr,
    heads,
    time,
    chunks,
    key_batch,
    key_head,
    key_time,
    value_batch,
    value_head,
    value_time,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the outputs (8) of one chunk for a block of value columns."""
    unit = tl.program_id(0).to(tl.int64)
    lane, start = unit // chunks, unit % chunks * SIZE
    i = tl.arange(0, SIZE)
    values = tl.program_id(1) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    q_ptr = lane_start(q_ptr, lane, heads, key_batch, key_head) + start * key_time
    z_ptr = states_ptr + unit * 2 * KEY_DIM * VALUE_DIM
    # (8): O = Q̄ z - (D ⊙ Q Kᵀ) Δ
    from_weight, from_momentum = through_state(
        q_ptr, key_time, time - start, z_ptr, values, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, SIZE, PRECISION
    )
    out = load_column(columns_ptr, unit, WEIGHT_LEFT, SIZE)[:, None] * from_weight
    out += load_column(columns_ptr, unit, MOMENTUM_LEFT, SIZE)[:, None] * from_momentum
    errors = load_tile(errors_ptr + unit * SIZE * VALUE_DIM, i, values, VALUE_DIM, SIZE, VALUE_DIM)
    out -= dot(load_square(mix_ptr, unit, SIZE), errors, PRECISION)
    out_ptr = lane_start(out_ptr, lane, heads, value_batch, value_head) + start * value_time
    store_tile(out_ptr, i, values, value_time, time - start, VALUE_DIM, out)
