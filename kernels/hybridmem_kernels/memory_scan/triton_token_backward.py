"""Backward kernels of independent chunks: gradients of products, tokens and gates.

Equation numbers refer to README.md.
"""

from typing import no_type_check

import triton
import triton.language as tl

from .triton_tiles import (
    ACTIVE,
    COLUMNS,
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
    dot,
    lane_start,
    load_column,
    load_rows,
    load_square,
    load_tile,
    store_square,
    store_tile,
)


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def mix_gradient_kernel(
    q_ptr,
    k_ptr,
    gates_ptr,
    rows_ptr,
    errors_ptr,
    grad_residuals_ptr,
    grad_out_ptr,
    strict_ptr,
    mix_ptr,
    grad_before_ptr,
    grad_after_ptr,
    lanes,
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
    """Compute the gradients of N and of D ⊙ Q Kᵀ, times their decays, and times their products of keys and queries.

    Key products are symmetric: their gradient goes to both keys, so the gradient of N is added to its transpose.
    """
    unit = tl.program_id(0).to(tl.int64)
    lane, start = unit // chunks, unit % chunks * SIZE
    i = tl.arange(0, SIZE)
    row = unit * SIZE * VALUE_DIM
    grad_out_ptr = lane_start(grad_out_ptr, lane, heads, value_batch, value_head) + start * value_time
    q_ptr = lane_start(q_ptr, lane, heads, key_batch, key_head) + start * key_time
    k_ptr = lane_start(k_ptr, lane, heads, key_batch, key_head) + start * key_time
    # (13): dN = -dR Δᵀ, to key products and to the rows D_{i-1} of (6)
    grad_strict = tl.zeros((SIZE, SIZE), tl.float32)
    for low in range(0, VALUE_DIM, VALUE_BLOCK):
        values = low + tl.arange(0, VALUE_BLOCK)
        errors = load_tile(errors_ptr + row, i, values, VALUE_DIM, SIZE, VALUE_DIM)
        residual = load_tile(grad_residuals_ptr + row, i, values, VALUE_DIM, SIZE, VALUE_DIM)
        grad_strict -= dot(residual, tl.trans(errors), PRECISION)
    continues_ptr = gates_ptr + (CONTINUES * lanes + lane) * time + start
    grad_strict *= tl.load(continues_ptr + i, mask=start + i < time, other=1.0)[:, None]
    strict = grad_strict * load_rows(rows_ptr, unit, 0, SIZE)
    store_square(strict_ptr, unit, strict + tl.trans(strict), SIZE)
    products = tl.zeros((SIZE, SIZE), tl.float32)
    for low in range(0, KEY_DIM, KEY_BLOCK):
        k = load_tile(k_ptr, i, low + tl.arange(0, KEY_BLOCK), key_time, time - start, KEY_DIM)
        products += dot(k, tl.trans(k), PRECISION)
    store_square(grad_before_ptr, unit, grad_strict * products, SIZE)

    # (13): d(D ⊙ Q Kᵀ) = -dO Δᵀ, to products of queries and keys and to the rows D_i
    grad_mix = tl.zeros((SIZE, SIZE), tl.float32)
    for low in range(0, VALUE_DIM, VALUE_BLOCK):
        values = low + tl.arange(0, VALUE_BLOCK)
        errors = load_tile(errors_ptr + row, i, values, VALUE_DIM, SIZE, VALUE_DIM)
        grad_out = load_tile(grad_out_ptr, i, values, value_time, time - start, VALUE_DIM)
        grad_mix -= dot(grad_out, tl.trans(errors), PRECISION)
    store_square(mix_ptr, unit, grad_mix * load_rows(rows_ptr, unit, 1, SIZE), SIZE)
    products = tl.zeros((SIZE, SIZE), tl.float32)
    for low in range(0, KEY_DIM, KEY_BLOCK):
        dims = low + tl.arange(0, KEY_BLOCK)
        q = load_tile(q_ptr, i, dims, key_time, time - start, KEY_DIM)
        k = load_tile(k_ptr, i, dims, key_time, time - start, KEY_DIM)
        products += dot(q, tl.trans(k), PRECISION)
    store_square(grad_after_ptr, unit, grad_mix * products, SIZE)


@triton.jit
@no_type_check
def contract(
    rows_ptr,
    row_stride,
    row_count,
    matrix_ptr,
    i,
    dims,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply a chunk's rows by a block of rows of a transposed (key_dim, value_dim) matrix, summing over values."""
    product = tl.zeros((SIZE, KEY_BLOCK), tl.float32)
    for low in range(0, VALUE_DIM, VALUE_BLOCK):
        values = low + tl.arange(0, VALUE_BLOCK)
        rows = load_tile(rows_ptr, i, values, row_stride, row_count, VALUE_DIM)
        matrix = load_tile(matrix_ptr, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
        product += dot(rows, tl.trans(matrix), PRECISION)
    return product


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def token_gradient_kernel(
    q_ptr,
    k_ptr,
    columns_ptr,
    states_ptr,
    grad_ends_ptr,
    errors_ptr,
    grad_residuals_ptr,
    grad_out_ptr,
    strict_ptr,
    mix_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_columns_ptr,
    grad_carry_ptr,
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
    """Compute the gradients of a block of query and key dimensions, and its share of the columns' gradients."""
    unit, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane, start = unit // chunks, unit % chunks * SIZE
    i = tl.arange(0, SIZE)
    dims = part * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    tokens_left = time - start
    key_start = (lane // heads) * key_batch + (lane % heads) * key_head + start * key_time
    grad_out_ptr = lane_start(grad_out_ptr, lane, heads, value_batch, value_head) + start * value_time
    STATE: tl.constexpr = KEY_DIM * VALUE_DIM
    row = unit * SIZE * VALUE_DIM
    z_ptr, end_ptr = states_ptr + unit * 2 * STATE, grad_ends_ptr + unit * 2 * STATE
    partial = unit * tl.num_programs(1) + part
    sums_ptr = grad_columns_ptr + partial * COLUMNS * SIZE + i

    # (13): products of keys and queries
    q = load_tile(q_ptr + key_start, i, dims, key_time, tokens_left, KEY_DIM)
    k = load_tile(k_ptr + key_start, i, dims, key_time, tokens_left, KEY_DIM)
    mix = load_square(mix_ptr, unit, SIZE)
    grad_q = dot(mix, k, PRECISION)
    grad_k = dot(tl.trans(mix), q, PRECISION) + dot(load_square(strict_ptr, unit, SIZE), k, PRECISION)
    # (14): dQ̄ = dO zᵀ, to queries and to a_i, p_i
    product = contract(
        grad_out_ptr,
        value_time,
        tokens_left,
        z_ptr,
        i,
        dims,
        KEY_DIM,
        VALUE_DIM,
        KEY_BLOCK,
        VALUE_BLOCK,
        SIZE,
        PRECISION,
    )
    tl.store(sums_ptr + WEIGHT_LEFT * SIZE, tl.sum(q * product, axis=1))
    grad_q += load_column(columns_ptr, unit, WEIGHT_LEFT, SIZE)[:, None] * product
    product = contract(
        grad_out_ptr,
        value_time,
        tokens_left,
        z_ptr + STATE,
        i,
        dims,
        KEY_DIM,
        VALUE_DIM,
        KEY_BLOCK,
        VALUE_BLOCK,
        SIZE,
        PRECISION,
    )
    tl.store(sums_ptr + MOMENTUM_LEFT * SIZE, tl.sum(q * product, axis=1))
    grad_q += load_column(columns_ptr, unit, MOMENTUM_LEFT, SIZE)[:, None] * product
    store_tile(grad_q_ptr + key_start, i, dims, key_time, tokens_left, KEY_DIM, grad_q)

    # (14): dK̄ = dR zᵀ, to keys and to a_{i-1}, p_{i-1}
    product = contract(
        grad_residuals_ptr + row,
        VALUE_DIM,
        SIZE,
        z_ptr,
        i,
        dims,
        KEY_DIM,
        VALUE_DIM,
        KEY_BLOCK,
        VALUE_BLOCK,
        SIZE,
        PRECISION,
    )
    tl.store(sums_ptr + WEIGHT_FOUND * SIZE, tl.sum(k * product, axis=1))
    grad_k += load_column(columns_ptr, unit, WEIGHT_FOUND, SIZE)[:, None] * product
    product = contract(
        grad_residuals_ptr + row,
        VALUE_DIM,
        SIZE,
        z_ptr + STATE,
        i,
        dims,
        KEY_DIM,
        VALUE_DIM,
        KEY_BLOCK,
        VALUE_BLOCK,
        SIZE,
        PRECISION,
    )
    tl.store(sums_ptr + MOMENTUM_FOUND * SIZE, tl.sum(k * product, axis=1))
    grad_k += load_column(columns_ptr, unit, MOMENTUM_FOUND, SIZE)[:, None] * product
    # (14): dK̂ = -Δ dz'ᵀ, to keys and to D_C, R_s[C]
    product = contract(
        errors_ptr + row, VALUE_DIM, SIZE, end_ptr, i, dims, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, SIZE, PRECISION
    )
    tl.store(sums_ptr + WRITE_LEFT * SIZE, -tl.sum(k * product, axis=1))
    grad_k -= load_column(columns_ptr, unit, WRITE_LEFT, SIZE)[:, None] * product
    product = contract(
        errors_ptr + row,
        VALUE_DIM,
        SIZE,
        end_ptr + STATE,
        i,
        dims,
        KEY_DIM,
        VALUE_DIM,
        KEY_BLOCK,
        VALUE_BLOCK,
        SIZE,
        PRECISION,
    )
    tl.store(sums_ptr + WRITE_MOVING * SIZE, -tl.sum(k * product, axis=1))
    grad_k -= load_column(columns_ptr, unit, WRITE_MOVING, SIZE)[:, None] * product
    store_tile(grad_k_ptr + key_start, i, dims, key_time, tokens_left, KEY_DIM, grad_k)

    # (15): dF = dz' zᵀ
    weight_left = tl.zeros((KEY_BLOCK, VALUE_BLOCK), tl.float32)
    momentum_left = tl.zeros((KEY_BLOCK, VALUE_BLOCK), tl.float32)
    momentum_kept = tl.zeros((KEY_BLOCK, VALUE_BLOCK), tl.float32)
    for low in range(0, VALUE_DIM, VALUE_BLOCK):
        values = low + tl.arange(0, VALUE_BLOCK)
        grad_weight = load_tile(end_ptr, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
        momentum = load_tile(z_ptr + STATE, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
        weight_left += grad_weight * load_tile(z_ptr, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
        momentum_left += grad_weight * momentum
        momentum_kept += load_tile(end_ptr + STATE, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM) * momentum
    carry_ptr = grad_carry_ptr + partial * 3
    tl.store(carry_ptr, tl.sum(tl.sum(weight_left, axis=1), axis=0))
    tl.store(carry_ptr + 1, tl.sum(tl.sum(momentum_left, axis=1), axis=0))
    tl.store(carry_ptr + 2, tl.sum(tl.sum(momentum_kept, axis=1), axis=0))


@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def gate_gradient_kernel(
    gates_ptr,
    rows_ptr,
    moving_ptr,
    columns_ptr,
    grad_before_ptr,
    grad_after_ptr,
    grad_columns_ptr,
    grad_carry_ptr,
    grad_gates_ptr,
    lanes,
    time,
    chunks,
    SIZE: tl.constexpr,
):
    """Compute the gradients of keep, eta and theta (16) by running the recurrences of `decay_kernel` in reverse.

    No token reads a later write. The gradients of these rows are meaningless, and are multiplied by zeros.
    """
    unit = tl.program_id(0).to(tl.int64)
    lane, start = unit // chunks, unit % chunks * SIZE
    j = tl.arange(0, SIZE)
    gate_ptr, gate = gates_ptr + lane * time + start, tl.cast(lanes, tl.int64) * time
    rows_ptr += unit * (SIZE + 1) * SIZE + j
    moving_ptr += unit * (SIZE + 1) * SIZE + j
    grad_before_ptr += unit * SIZE * SIZE + j
    grad_after_ptr += unit * SIZE * SIZE + j
    column_ptr = grad_columns_ptr + unit * COLUMNS * SIZE
    grad_left = load_column(grad_columns_ptr, unit, WRITE_LEFT, SIZE)
    grad_moving = load_column(grad_columns_ptr, unit, WRITE_MOVING, SIZE)
    grad_weight = tl.load(grad_carry_ptr + unit * 3)
    grad_momentum = tl.load(grad_carry_ptr + unit * 3 + 1)
    grad_kept = tl.load(grad_carry_ptr + unit * 3 + 2)
    grad_keep = tl.zeros((SIZE,), tl.float32)
    grad_eta, grad_theta, weights, momenta, kepts = grad_keep, grad_keep, grad_keep, grad_keep, grad_keep
    for step in range(SIZE):
        i = SIZE - 1 - step
        inside = start + i < time
        keep = tl.load(gate_ptr + KEEP * gate + i, mask=inside, other=1.0)
        eta = tl.load(gate_ptr + ETA * gate + i, mask=inside, other=1.0)
        active = tl.load(gate_ptr + ACTIVE * gate + i, mask=inside, other=0.0)
        continues = tl.load(gate_ptr + CONTINUES * gate + i, mask=inside, other=1.0)
        # (5), (4) backwards: columns of the writes
        grad_left += tl.where(j <= i, tl.load(grad_after_ptr + i * SIZE), 0.0)
        grad_moving += active * grad_left
        grad_keep = tl.where(j == i, tl.sum(grad_left * tl.load(rows_ptr + i * SIZE), axis=0), grad_keep)
        moved = tl.sum(grad_moving * tl.load(moving_ptr + i * SIZE), axis=0)
        grad_eta = tl.where(j == i, moved, grad_eta)
        grad_theta = tl.where(j == i, grad_moving, grad_theta)
        grad_left = keep * grad_left + tl.where(j < i, tl.load(grad_before_ptr + i * SIZE), 0.0)
        grad_moving = eta * grad_moving
        # (5), (4) backwards: columns of the chunk's first state
        grad_weight += tl.load(column_ptr + WEIGHT_LEFT * SIZE + i)
        grad_momentum += tl.load(column_ptr + MOMENTUM_LEFT * SIZE + i)
        grad_kept += active * grad_momentum
        weights = tl.where(j == i, grad_weight, weights)
        momenta = tl.where(j == i, grad_momentum, momenta)
        kepts = tl.where(j == i, grad_kept, kepts)
        grad_weight = keep * grad_weight + continues * tl.load(column_ptr + WEIGHT_FOUND * SIZE + i)
        grad_momentum = keep * grad_momentum + continues * tl.load(column_ptr + MOMENTUM_FOUND * SIZE + i)
        grad_kept = eta * grad_kept
    before_ptr = columns_ptr + unit * COLUMNS * SIZE + j - 1
    grad_keep += weights * tl.load(before_ptr + WEIGHT_LEFT * SIZE, mask=j > 0, other=1.0)
    grad_keep += momenta * tl.load(before_ptr + MOMENTUM_LEFT * SIZE, mask=j > 0, other=0.0)
    grad_eta += kepts * tl.load(before_ptr + MOMENTUM_KEPT * SIZE, mask=j > 0, other=1.0)
    grad_ptr, inside = grad_gates_ptr + lane * time + start + j, start + j < time
    tl.store(grad_ptr + KEEP * gate, grad_keep, mask=inside)
    tl.store(grad_ptr + ETA * gate, grad_eta, mask=inside)
    tl.store(grad_ptr + THETA * gate, grad_theta, mask=inside)
