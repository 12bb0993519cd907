"""Backward kernels of the answers, in parallel over chunks, each from its initial state.

Gradients share the layout of their tensors: grad_y that of y, grad_error (of delta) that of u, and grad_a, the gradient
of each layer's input, that of the inputs in z. Equation numbers refer to README.md.
"""

from typing import no_type_check

import triton
import triton.language as tl

from .triton_tiles import (
    OF_MOMENTUM,
    OF_WEIGHT,
    RATE,
    VECTORS,
    input_column,
    input_tile,
    input_width,
    load_error,
    load_input,
    load_matrix,
    output_width,
    read,
    row_size,
    slope,
    state_size,
    store_sum,
    surprise,
    tile,
    vector,
    zero_tile,
    zero_vector,
)
from .triton_tokens import store_tokens, token_slots


@triton.jit(do_not_specialize=["heads", "blocks", "depth", "width", "hidden", "slots"])
@no_type_check
def surprise_kernel(
    z_ptr,
    u_ptr,
    vectors_ptr,
    states_ptr,
    begins_ptr,
    max_grad_norm,
    heads,
    blocks,
    depth,
    width,
    hidden,
    slots,
    CUT: tl.constexpr,
):
    """Recompute z, u and rates of one chunk: (5) and (6)."""
    shape = (depth, width, hidden, slots)
    program = tl.program_id(0).to(tl.int64)
    lane, block = program // blocks, program % blocks
    begins = (block > 0) | (tl.load(begins_ptr + lane // heads * blocks + block) != 0)
    anchor = lane * (blocks + 2) + tl.where(begins, block, blocks + 1)
    surprise(
        z_ptr + program * (slots * row_size(shape)),
        u_ptr + program * (slots * row_size(shape)),
        states_ptr + anchor * (2 * state_size(shape)),
        vectors_ptr + program * (VECTORS * slots),
        max_grad_norm,
        shape,
        CUT,
    )


@triton.jit
@no_type_check
def _pairs(
    y,
    z,
    u,
    grad_y,
    vectors,
    decays,
    grad_vectors,
    grad_decays,
    pairs,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Write M = (D ⊙ X aᵀ) r of (7) and the gradient of X aᵀ to `pairs`; compute the gradients of D and the rates."""
    depth, _, hidden, slots = shape
    first = layer == depth - 1
    for source in tl.range(0, slots, CUT.rows, disable_licm=True):
        rate = tl.load(vector(vectors, RATE, source, shape, CUT))[None, :]
        grad_rate = zero_vector(CUT.rows)
        for row in tl.range(0, slots, CUT.rows, disable_licm=True):
            scores, grads = zero_tile(CUT.rows, CUT.rows), zero_tile(CUT.rows, CUT.rows)
            for inner in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
                x = load_input(y, row, inner, layer, shape, CUT)
                a = load_input(z, source, inner, layer, shape, CUT)
                scores = tl.dot(x, tl.trans(a), scores, input_precision=CUT.precision)
            for inner in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
                grad = tl.load(input_tile(grad_y, row, layer * hidden + inner, shape, CUT))
                error = load_error(z, u, source, inner, layer, shape, CUT)
                grads = tl.dot(grad, tl.trans(error), grads, input_precision=CUT.precision)
            decay = tl.load(tile(decays, row, source, slots, CUT.rows, CUT.rows))
            tl.store(tile(pairs, row, source, slots, CUT.rows, CUT.rows), scores * decay * rate)
            tl.store(tile(pairs + slots * slots, row, source, slots, CUT.rows, CUT.rows), -grads * decay * rate)
            grads *= -scores
            grad_rate += tl.sum(grads * decay, 0)
            store_sum(tile(grad_decays, row, source, slots, CUT.rows, CUT.rows), grads * rate, first)
        store_sum(vector(grad_vectors, RATE, source, shape, CUT), grad_rate, first)


@triton.jit
@no_type_check
def _back_through(grad_y, matrices, row, column, layer, shape, CUT: tl.constexpr):
    """Multiply a tile of a layer's output gradients by the layer's transposed matrix."""
    _, _, hidden, _ = shape
    total = zero_tile(CUT.rows, CUT.tile)
    for inner in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
        grad = tl.load(input_tile(grad_y, row, layer * hidden + inner, shape, CUT))
        matrix = load_matrix(matrices, column, inner, layer, shape, CUT)
        total = tl.dot(grad, tl.trans(matrix), total, input_precision=CUT.precision)
    return total


@triton.jit
@no_type_check
def _queries_backward(
    y,
    z,
    grad_y,
    state,
    vectors,
    grad_vectors,
    pairs,
    grad_q_ptr,
    times_ptr,
    valid_ptr,
    chunk,
    used,
    dim,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Compute the gradients of a layer's queries X, R_w[i, 0] and R_w[i, 1] through (7)."""
    depth, _, hidden, slots = shape
    first = layer == depth - 1
    for row in tl.range(0, slots, CUT.rows, disable_licm=True):
        of_weight = tl.load(vector(vectors, OF_WEIGHT, row, shape, CUT))[:, None]
        of_momentum = tl.load(vector(vectors, OF_MOMENTUM, row, shape, CUT))[:, None]
        grad_of_weight, grad_of_momentum = zero_vector(CUT.rows), zero_vector(CUT.rows)
        for column in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
            by_weight = _back_through(grad_y, state, row, column, layer, shape, CUT)
            by_momentum = _back_through(grad_y, state + state_size(shape), row, column, layer, shape, CUT)
            x = load_input(y, row, column, layer, shape, CUT)
            grad_of_weight += tl.sum(x * by_weight, 1)
            grad_of_momentum += tl.sum(x * by_momentum, 1)
            grad_x = by_weight * of_weight + by_momentum * of_momentum
            for source in tl.range(0, slots, CUT.rows, disable_licm=True):
                pair = tl.load(tile(pairs + slots * slots, row, source, slots, CUT.rows, CUT.rows))
                a = load_input(z, source, column, layer, shape, CUT)
                grad_x = tl.dot(pair, a, grad_x, input_precision=CUT.precision)
            if layer > 0:
                at = input_tile(y, row, input_column(layer, shape) + column, shape, CUT)
                grad_x *= slope(tl.load(at))
                target = input_tile(grad_y, row, input_column(layer, shape) + column, shape, CUT)
                tl.store(target, grad_x)
            else:
                last = (depth - 1) * hidden
                grad_x += tl.load(input_tile(grad_y, row, last + column, shape, CUT))
                times, valid = token_slots(times_ptr, valid_ptr, chunk, row, used, CUT)
                store_tokens(grad_q_ptr, times, valid, column, grad_x, dim, CUT)
        store_sum(vector(grad_vectors, OF_WEIGHT, row, shape, CUT), grad_of_weight, first)
        store_sum(vector(grad_vectors, OF_MOMENTUM, row, shape, CUT), grad_of_momentum, first)


@triton.jit
@no_type_check
def _writes_backward(
    y,
    grad_y,
    grad_a,
    grad_error,
    pairs,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Compute the gradients of a layer's a and δ through the last term of (7)."""
    _, _, hidden, slots = shape
    for source in tl.range(0, slots, CUT.rows, disable_licm=True):
        for column in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
            grad = zero_tile(CUT.rows, CUT.tile)
            for row in tl.range(0, slots, CUT.rows, disable_licm=True):
                pair = tl.load(tile(pairs + slots * slots, row, source, slots, CUT.rows, CUT.rows))
                x = load_input(y, row, column, layer, shape, CUT)
                grad = tl.dot(tl.trans(pair), x, grad, input_precision=CUT.precision)
            tl.store(input_tile(grad_a, source, input_column(layer, shape) + column, shape, CUT), grad)
        for column in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
            grad = zero_tile(CUT.rows, CUT.tile)
            at = layer * hidden + column
            for row in tl.range(0, slots, CUT.rows, disable_licm=True):
                pair = tl.load(tile(pairs, row, source, slots, CUT.rows, CUT.rows))
                grad_answer = tl.load(input_tile(grad_y, row, at, shape, CUT))
                grad = tl.dot(tl.trans(pair), grad_answer, grad, input_precision=CUT.precision)
            tl.store(input_tile(grad_error, source, at, shape, CUT), -grad)


@triton.jit(do_not_specialize=["time", "heads", "blocks", "used", "depth", "width", "hidden", "slots"])
@no_type_check
def read_backward_kernel(
    y_ptr,
    z_ptr,
    u_ptr,
    vectors_ptr,
    decays_ptr,
    states_ptr,
    grad_y_ptr,
    grad_a_ptr,
    grad_error_ptr,
    grad_vectors_ptr,
    grad_decays_ptr,
    pairs_ptr,
    grad_q_ptr,
    times_ptr,
    valid_ptr,
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
    """Recompute the answers of one chunk, then backpropagate through them, last layer first."""
    shape = (depth, width, hidden, slots)
    program = tl.program_id(0).to(tl.int64)
    lane, block = program // blocks, program % blocks
    rows_at = program * (slots * row_size(shape))
    y, z, u, grad_y = y_ptr + rows_at, z_ptr + rows_at, u_ptr + rows_at, grad_y_ptr + rows_at
    grad_a, grad_error = grad_a_ptr + rows_at, grad_error_ptr + rows_at
    vectors, grad_vectors = (
        vectors_ptr + program * (VECTORS * slots),
        grad_vectors_ptr + program * (VECTORS * slots),
    )
    decays, pairs = (
        decays_ptr + program * (2 * slots * slots),
        pairs_ptr + program * (2 * slots * slots),
    )
    grad_decays = grad_decays_ptr + program * (slots * slots)
    state = states_ptr + (lane * (blocks + 2) + block) * (2 * state_size(shape))
    chunk = lane // heads * blocks + block
    # (7): the answers of every layer except the last
    for layer in tl.range(0, depth - 1, disable_licm=True):
        for row in tl.range(0, slots, CUT.rows, disable_licm=True):
            for column in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
                answer = read(y, z, u, state, vectors, decays, row, column, layer, shape, CUT)
                tl.store(input_tile(y, row, layer * hidden + column, shape, CUT), answer)
        tl.debug_barrier()
    # (7), backward
    for back in tl.range(1, depth + 1, disable_licm=True):
        _pairs(y, z, u, grad_y, vectors, decays, grad_vectors, grad_decays, pairs, depth - back, shape, CUT)
        tl.debug_barrier()
        _queries_backward(
            y,
            z,
            grad_y,
            state,
            vectors,
            grad_vectors,
            pairs,
            grad_q_ptr + lane * time * dim,
            times_ptr,
            valid_ptr,
            chunk,
            used,
            dim,
            depth - back,
            shape,
            CUT,
        )
        _writes_backward(y, grad_y, grad_a, grad_error, pairs, depth - back, shape, CUT)
        tl.debug_barrier()
