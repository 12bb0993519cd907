"""Kernels between tokens and chunks: gathering tokens, unrolling gates, and the backward of both."""

from typing import no_type_check

import triton
import triton.language as tl

from .triton_tiles import (
    ACTIVE,
    ETA,
    KEEP,
    LAST_MOMENTA,
    MOMENTUM_KEPT,
    OF_MOMENTUM,
    OF_WEIGHT,
    THETA,
    VECTORS,
    input_tile,
    row_size,
    vector,
)


@triton.jit
@no_type_check
def token_slots(times_ptr, valid_ptr, chunk, row, used, CUT: tl.constexpr):
    """Load (times, valid) of a chunk's slots from `row` on; `chunk` counts the chunks of rows, which heads share."""
    slots = row + tl.arange(0, CUT.rows)
    place = chunk * used + slots
    valid = tl.load(valid_ptr + place, mask=slots < used, other=0) != 0
    return tl.load(times_ptr + place, mask=valid, other=0), valid


@triton.jit
@no_type_check
def _load_tokens(ptr, times, valid, time_stride, column, dim, CUT: tl.constexpr):
    columns = column + tl.arange(0, CUT.tile)
    mask = valid[:, None] & (columns < dim)[None, :]
    return tl.load(ptr + times[:, None] * time_stride + columns[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
@no_type_check
def store_tokens(ptr, times, valid, column, values, dim, CUT: tl.constexpr):
    """Store a tile at the positions of its tokens in a contiguous tensor."""
    columns = column + tl.arange(0, CUT.tile)
    mask = valid[:, None] & (columns < dim)[None, :]
    tl.store(ptr + times[:, None] * dim + columns[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["time", "heads", "blocks", "used", "depth", "width", "hidden", "slots"])
@no_type_check
def gather_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    alpha_ptr,
    eta_ptr,
    theta_ptr,
    times_ptr,
    valid_ptr,
    y_ptr,
    z_ptr,
    u_ptr,
    grad_y_ptr,
    vectors_ptr,
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    grad_out_batch,
    grad_out_head,
    grad_out_time,
    time,
    heads,
    blocks,
    used,
    dim,
    depth,
    width,
    hidden,
    slots,
    CUT: tl.constexpr,
):
    """Gather one chunk: queries, keys, k - v, the output's gradient in the backward, and gates, including padding."""
    shape = (depth, width, hidden, slots)
    program = tl.program_id(0).to(tl.int64)
    lane, block = program // blocks, program % blocks
    batch, head = lane // heads, lane % heads
    vectors_ptr += program * (VECTORS * slots)
    rows_at = program * (slots * row_size(shape))
    for row in tl.range(0, slots, CUT.rows, disable_licm=True):
        times, valid = token_slots(times_ptr, valid_ptr, batch * blocks + block, row, used, CUT)
        gate = lane * time + times
        # An empty slot has no effect: it keeps weights and momentum, and writes nothing.
        alpha = tl.load(alpha_ptr + gate, mask=valid, other=0).to(tl.float32)
        tl.store(vector(vectors_ptr, KEEP, row, shape, CUT), 1 - alpha)
        eta = tl.load(eta_ptr + gate, mask=valid, other=0).to(tl.float32)
        tl.store(vector(vectors_ptr, ETA, row, shape, CUT), tl.where(valid, eta, 1.0))
        theta = tl.load(theta_ptr + gate, mask=valid, other=0).to(tl.float32)
        tl.store(vector(vectors_ptr, THETA, row, shape, CUT), theta)
        tl.store(vector(vectors_ptr, ACTIVE, row, shape, CUT), valid.to(tl.float32))
        for column in tl.range(0, width, CUT.tile, disable_licm=True):
            q = _load_tokens(q_ptr + batch * q_batch + head * q_head, times, valid, q_time, column, dim, CUT)
            k = _load_tokens(k_ptr + batch * k_batch + head * k_head, times, valid, k_time, column, dim, CUT)
            v = _load_tokens(v_ptr + batch * v_batch + head * v_head, times, valid, v_time, column, dim, CUT)
            at = rows_at + (depth - 1) * hidden
            tl.store(input_tile(y_ptr + at, row, column, shape, CUT), q)
            tl.store(input_tile(z_ptr + at, row, column, shape, CUT), k)
            tl.store(input_tile(u_ptr + at, row, column, shape, CUT), k - v)
            if grad_out_ptr is not None:
                grad_out = _load_tokens(
                    grad_out_ptr + batch * grad_out_batch + head * grad_out_head,
                    times,
                    valid,
                    grad_out_time,
                    column,
                    dim,
                    CUT,
                )
                tl.store(input_tile(grad_y_ptr + at, row, column, shape, CUT), grad_out)


@triton.jit
@no_type_check
def decays_kernel(vectors_ptr, decays_ptr, SLOTS: tl.constexpr):
    """Compute the rows R_s and R_w of decays.py for one chunk, row by row."""
    program = tl.program_id(0).to(tl.int64)
    vectors_ptr += program * (VECTORS * SLOTS)
    decays_ptr += program * (2 * SLOTS * SLOTS)
    slots = tl.arange(0, SLOTS)
    weight_row, momentum_row = tl.zeros((SLOTS,), tl.float32), tl.zeros((SLOTS,), tl.float32)
    of_weight, of_momentum, momentum_kept = 1.0, 0.0, 1.0
    for i in range(SLOTS):
        keep = tl.load(vectors_ptr + KEEP * SLOTS + i)
        eta = tl.load(vectors_ptr + ETA * SLOTS + i)
        active = tl.load(vectors_ptr + ACTIVE * SLOTS + i)
        # R_s, R_w: columns of the writes, then of the chunk's first state
        momentum_row = momentum_row * eta + tl.where(slots == i, 1.0, 0.0)
        weight_row = weight_row * keep + momentum_row * active
        momentum_kept *= eta
        of_momentum = of_momentum * keep + momentum_kept * active
        of_weight *= keep
        tl.store(decays_ptr + i * SLOTS + slots, weight_row)
        tl.store(decays_ptr + (SLOTS + i) * SLOTS + slots, momentum_row)
        tl.store(vectors_ptr + OF_WEIGHT * SLOTS + i, of_weight)
        tl.store(vectors_ptr + OF_MOMENTUM * SLOTS + i, of_momentum)
        tl.store(vectors_ptr + MOMENTUM_KEPT * SLOTS + i, momentum_kept)


@triton.jit
@no_type_check
def decays_backward_kernel(vectors_ptr, decays_ptr, grad_vectors_ptr, grad_decays_ptr, SLOTS: tl.constexpr):
    """Compute the gradients of keep and eta from the gradients of one chunk's rows, last row first.

    Among the rows of the momenta, only the last one has a direct gradient: the next chunk starts from it.
    """
    program = tl.program_id(0).to(tl.int64)
    vectors_ptr += program * (VECTORS * SLOTS)
    decays_ptr += program * (2 * SLOTS * SLOTS)
    grad_vectors_ptr += program * (VECTORS * SLOTS)
    grad_decays_ptr += program * (SLOTS * SLOTS)
    slots = tl.arange(0, SLOTS)
    grad_weight_row = tl.zeros((SLOTS,), tl.float32)
    grad_momentum_row = tl.load(grad_vectors_ptr + LAST_MOMENTA * SLOTS + slots)
    grad_of_weight, grad_of_momentum = 0.0, 0.0
    grad_momentum_kept = tl.load(grad_vectors_ptr + MOMENTUM_KEPT * SLOTS + SLOTS - 1)
    for step in range(SLOTS):
        i = tl.cast(SLOTS - 1 - step, tl.int32)
        keep = tl.load(vectors_ptr + KEEP * SLOTS + i)
        eta = tl.load(vectors_ptr + ETA * SLOTS + i)
        active = tl.load(vectors_ptr + ACTIVE * SLOTS + i)
        # backward of R_w, then of R_s
        grad_weight_row += tl.load(grad_decays_ptr + i * SLOTS + slots)
        grad_of_weight += tl.load(grad_vectors_ptr + OF_WEIGHT * SLOTS + i)
        grad_of_momentum += tl.load(grad_vectors_ptr + OF_MOMENTUM * SLOTS + i)
        grad_momentum_row += grad_weight_row * active
        grad_momentum_kept += grad_of_momentum * active
        # The previous row; the chunk's initial state precedes the first row.
        inside = i > 0
        weight_row = tl.load(decays_ptr + (i - 1) * SLOTS + slots, mask=slots < i, other=0)
        momentum_row = tl.load(decays_ptr + (SLOTS + i - 1) * SLOTS + slots, mask=slots < i, other=0)
        of_weight = tl.load(vectors_ptr + OF_WEIGHT * SLOTS + i - 1, mask=inside, other=1)
        of_momentum = tl.load(vectors_ptr + OF_MOMENTUM * SLOTS + i - 1, mask=inside, other=0)
        momentum_kept = tl.load(vectors_ptr + MOMENTUM_KEPT * SLOTS + i - 1, mask=inside, other=1)
        grad_keep = tl.sum(grad_weight_row * weight_row, 0)
        grad_keep += grad_of_weight * of_weight + grad_of_momentum * of_momentum
        tl.store(grad_vectors_ptr + KEEP * SLOTS + i, grad_keep)
        grad_eta = tl.sum(grad_momentum_row * momentum_row, 0) + grad_momentum_kept * momentum_kept
        tl.store(grad_vectors_ptr + ETA * SLOTS + i, grad_eta)
        grad_weight_row *= keep
        grad_of_weight *= keep
        grad_of_momentum *= keep
        grad_momentum_row *= eta
        grad_momentum_kept *= eta


@triton.jit(do_not_specialize=["time", "heads", "blocks", "used", "depth", "width", "hidden", "slots"])
@no_type_check
def scatter_kernel(
    grad_a_ptr,
    grad_error_ptr,
    grad_vectors_ptr,
    times_ptr,
    valid_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_alpha_ptr,
    grad_eta_ptr,
    grad_theta_ptr,
    time,
    heads,
    blocks,
    used,
    dim,
    depth,
    width,
    hidden,
    slots,
    CUT: tl.constexpr,
):
    """Scatter one chunk's gradients of keys, values and gates to the positions of its tokens."""
    shape = (depth, width, hidden, slots)
    program = tl.program_id(0).to(tl.int64)
    lane, block = program // blocks, program % blocks
    grad_vectors_ptr += program * (VECTORS * slots)
    rows_at = program * (slots * row_size(shape))
    for row in tl.range(0, slots, CUT.rows, disable_licm=True):
        times, valid = token_slots(times_ptr, valid_ptr, lane // heads * blocks + block, row, used, CUT)
        gate = lane * time + times
        grad_keep = tl.load(vector(grad_vectors_ptr, KEEP, row, shape, CUT))
        tl.store(grad_alpha_ptr + gate, (-grad_keep).to(grad_alpha_ptr.dtype.element_ty), mask=valid)
        grad_eta = tl.load(vector(grad_vectors_ptr, ETA, row, shape, CUT))
        tl.store(grad_eta_ptr + gate, grad_eta.to(grad_eta_ptr.dtype.element_ty), mask=valid)
        grad_theta = tl.load(vector(grad_vectors_ptr, THETA, row, shape, CUT))
        tl.store(grad_theta_ptr + gate, grad_theta.to(grad_theta_ptr.dtype.element_ty), mask=valid)
        for column in tl.range(0, width, CUT.tile, disable_licm=True):
            at = rows_at + (depth - 1) * hidden
            grad_key = tl.load(input_tile(grad_a_ptr + at, row, column, shape, CUT))
            grad_error = tl.load(input_tile(grad_error_ptr + at, row, column, shape, CUT))
            tokens_at = lane * time * dim
            store_tokens(grad_k_ptr + tokens_at, times, valid, column, grad_key + grad_error, dim, CUT)
            store_tokens(grad_v_ptr + tokens_at, times, valid, column, -grad_error, dim, CUT)
