"""Backward kernels of the states: their reconstruction from checkpoints, and their adjoints.

Equation numbers refer to README.md.
"""

from typing import no_type_check

import triton
import triton.language as tl

from .triton_tiles import (
    COUNTS,
    MOMENTUM_FOUND,
    MOMENTUM_LEFT,
    WEIGHT_FOUND,
    WEIGHT_LEFT,
    WRITE_LEFT,
    WRITE_MOVING,
    copy_state,
    dot,
    lane_start,
    load_carry,
    load_column,
    load_square,
    load_tile,
    store_tile,
    through_state,
)


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def restore_kernel(
    k_ptr,
    columns_ptr,
    checkpoints_ptr,
    errors_ptr,
    states_ptr,
    heads,
    time,
    chunks,
    checkpoints,
    key_batch,
    key_head,
    key_time,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Recompute a block of the states of two chunks from the checkpoint before them."""
    pair = tl.program_id(0).to(tl.int64)
    lane, chunk = pair // checkpoints, pair % checkpoints * 2
    unit, start = lane * chunks + chunk, chunk * SIZE
    i = tl.arange(0, SIZE)
    dims = tl.program_id(1) * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    values = tl.program_id(2) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    STATE: tl.constexpr = KEY_DIM * VALUE_DIM
    checkpoint_ptr, z_ptr = checkpoints_ptr + pair * 2 * STATE, states_ptr + unit * 2 * STATE
    weight = load_tile(checkpoint_ptr, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
    momentum = load_tile(checkpoint_ptr + STATE, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
    store_tile(z_ptr, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM, weight)
    store_tile(z_ptr + STATE, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM, momentum)
    # (9): the state after the first chunk
    if chunk + 1 < chunks:
        k_ptr = lane_start(k_ptr, lane, heads, key_batch, key_head) + start * key_time
        k = tl.trans(load_tile(k_ptr, i, dims, key_time, time - start, KEY_DIM))
        errors = load_tile(errors_ptr + unit * SIZE * VALUE_DIM, i, values, VALUE_DIM, SIZE, VALUE_DIM)
        left = load_column(columns_ptr, unit, WRITE_LEFT, SIZE)[:, None] * errors
        moving = load_column(columns_ptr, unit, WRITE_MOVING, SIZE)[:, None] * errors
        weight_left, momentum_left, momentum_kept = load_carry(columns_ptr, unit, SIZE)
        weight = weight_left * weight + momentum_left * momentum - dot(k, left, PRECISION)
        momentum = momentum_kept * momentum - dot(k, moving, PRECISION)
        store_tile(z_ptr + 2 * STATE, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM, weight)
        store_tile(z_ptr + 3 * STATE, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM, momentum)


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def seed_kernel(
    q_ptr,
    mix_ptr,
    columns_ptr,
    grad_out_ptr,
    grad_ends_ptr,
    grad_residuals_ptr,
    grad_weight_ptr,
    grad_momentum_ptr,
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
    """Compute the contribution of a chunk's outputs to the gradients of its errors and of its first state."""
    unit = tl.program_id(0).to(tl.int64)
    lane, chunk = unit // chunks, unit % chunks
    start = chunk * SIZE
    i = tl.arange(0, SIZE)
    values = tl.program_id(1) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    STATE: tl.constexpr = KEY_DIM * VALUE_DIM
    grad_out_ptr = lane_start(grad_out_ptr, lane, heads, value_batch, value_head) + start * value_time
    grad_out = load_tile(grad_out_ptr, i, values, value_time, time - start, VALUE_DIM)
    # (10): -(D ⊙ Q Kᵀ)ᵀ dO
    grad_errors = -dot(tl.trans(load_square(mix_ptr, unit, SIZE)), grad_out, PRECISION)
    store_tile(grad_residuals_ptr + unit * SIZE * VALUE_DIM, i, values, VALUE_DIM, SIZE, VALUE_DIM, grad_errors)
    # (12): Q̄ᵀ dO
    from_weight = load_column(columns_ptr, unit, WEIGHT_LEFT, SIZE)[:, None] * grad_out
    from_momentum = load_column(columns_ptr, unit, MOMENTUM_LEFT, SIZE)[:, None] * grad_out
    q_ptr = lane_start(q_ptr, lane, heads, key_batch, key_head) + start * key_time
    end_ptr = grad_ends_ptr + (unit - 1) * 2 * STATE
    weight_ptr = tl.where(chunk == 0, grad_weight_ptr + lane * STATE, end_ptr)
    momentum_ptr = tl.where(chunk == 0, grad_momentum_ptr + lane * STATE, end_ptr + STATE)
    for low in range(0, KEY_DIM, KEY_BLOCK):
        dims = low + tl.arange(0, KEY_BLOCK)
        q = tl.trans(load_tile(q_ptr, i, dims, key_time, time - start, KEY_DIM))
        weight = dot(q, from_weight, PRECISION)
        store_tile(weight_ptr, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM, weight)
        momentum = dot(q, from_momentum, PRECISION)
        store_tile(momentum_ptr, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM, momentum)


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def adjoint_kernel(
    k_ptr,
    inverse_ptr,
    columns_ptr,
    grad_last_weight_ptr,
    grad_last_momentum_ptr,
    grad_ends_ptr,
    grad_residuals_ptr,
    grad_v_ptr,
    grad_weight_ptr,
    grad_momentum_ptr,
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
    """Run the scan in reverse: gradients of the state after every chunk, of K̄ z - V, and of the first state.

    The results are added to those of `seed_kernel`. Barriers order a program's own stores and loads, as in the forward.
    """
    lane = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, SIZE), tl.arange(0, KEY_BLOCK)
    values = tl.program_id(1) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    STATE: tl.constexpr = KEY_DIM * VALUE_DIM
    last = tl.cast(chunks - 1, tl.int64) * SIZE
    k_ptr = lane_start(k_ptr, lane, heads, key_batch, key_head) + last * key_time
    grad_v_ptr = lane_start(grad_v_ptr, lane, heads, value_batch, value_head) + last * value_time
    z_ptr = grad_ends_ptr + (lane * chunks + chunks - 1) * 2 * STATE
    copy_state(
        grad_last_weight_ptr + lane * STATE,
        grad_last_momentum_ptr + lane * STATE,
        z_ptr,
        values,
        KEY_DIM,
        VALUE_DIM,
        KEY_BLOCK,
    )
    tl.debug_barrier()

    for step in range(chunks):
        chunk = chunks - 1 - step
        unit = lane * chunks + chunk
        tokens = time - chunk * SIZE
        # (10): - K̂ dz'
        to_weight, to_momentum = through_state(
            k_ptr, key_time, tokens, z_ptr, values, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, SIZE, PRECISION
        )
        row_ptr = grad_residuals_ptr + unit * SIZE * VALUE_DIM
        grad_errors = load_tile(row_ptr, i, values, VALUE_DIM, SIZE, VALUE_DIM)
        grad_errors -= load_column(columns_ptr, unit, WRITE_LEFT, SIZE)[:, None] * to_weight
        grad_errors -= load_column(columns_ptr, unit, WRITE_MOVING, SIZE)[:, None] * to_momentum
        # (11): dR = (I + N)⁻ᵀ dΔ, and dV of (14)
        residual = dot(tl.trans(load_square(inverse_ptr, unit, SIZE)), grad_errors, PRECISION)
        store_tile(row_ptr, i, values, VALUE_DIM, SIZE, VALUE_DIM, residual)
        store_tile(grad_v_ptr, i, values, value_time, tokens, VALUE_DIM, -residual)

        # (12): + K̄ᵀ dR + Fᵀ dz'
        weight_left, momentum_left, momentum_kept = load_carry(columns_ptr, unit, SIZE)
        found_weight = load_column(columns_ptr, unit, WEIGHT_FOUND, SIZE)[:, None] * residual
        found_momentum = load_column(columns_ptr, unit, MOMENTUM_FOUND, SIZE)[:, None] * residual
        next_weight_ptr = tl.where(chunk == 0, grad_weight_ptr + lane * STATE, z_ptr - 2 * STATE)
        next_momentum_ptr = tl.where(chunk == 0, grad_momentum_ptr + lane * STATE, z_ptr - STATE)
        for low in range(0, KEY_DIM, KEY_BLOCK):
            k = tl.trans(load_tile(k_ptr, i, low + d, key_time, tokens, KEY_DIM))
            weight = load_tile(z_ptr, low + d, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
            momentum = load_tile(z_ptr + STATE, low + d, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
            momentum = momentum_left * weight + momentum_kept * momentum + dot(k, found_momentum, PRECISION)
            momentum += load_tile(next_momentum_ptr, low + d, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
            store_tile(next_momentum_ptr, low + d, values, VALUE_DIM, KEY_DIM, VALUE_DIM, momentum)
            weight = weight_left * weight + dot(k, found_weight, PRECISION)
            weight += load_tile(next_weight_ptr, low + d, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
            store_tile(next_weight_ptr, low + d, values, VALUE_DIM, KEY_DIM, VALUE_DIM, weight)
        tl.debug_barrier()
        z_ptr -= 2 * STATE
        k_ptr -= tl.cast(key_time, tl.int64) * SIZE
        grad_v_ptr -= tl.cast(value_time, tl.int64) * SIZE
