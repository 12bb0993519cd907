"""Backward kernels of the scan over chunks, last chunk first: through the writes and the inner gradient.

The error δ of a layer depends on the layer above and on its own z. Therefore grad_error first ascends the layers, and
then all gradients descend again. triton_read_backward.py has already written the contribution of the answers. Equation
numbers refer to README.md.
"""

from typing import no_type_check

import triton
import triton.language as tl

from .triton_tiles import (
    LAST_MOMENTA,
    MOMENTUM_KEPT,
    OF_MOMENTUM,
    OF_WEIGHT,
    RATE,
    THETA,
    VECTORS,
    curvature,
    errors_through,
    gradient_norm,
    input_column,
    input_tile,
    input_width,
    load_error,
    load_input,
    load_matrix,
    matrix_start,
    output_width,
    row_size,
    slope,
    squares,
    state_size,
    store_sum,
    tile,
    tile_mask,
    vector,
    zero_tile,
    zero_vector,
)


@triton.jit
@no_type_check
def _inputs_through(z, matrices, total, scale, row, column, layer, shape, CUT: tl.constexpr):
    """Subtract a tile of a layer's scaled inputs times a matrix from `total`."""
    for inner in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
        a = load_input(z, row, inner, layer, shape, CUT) * -scale[:, None]
        matrix = load_matrix(matrices, inner, column, layer, shape, CUT)
        total = tl.dot(a, matrix, total, input_precision=CUT.precision)
    return total


@triton.jit
@no_type_check
def _write_backward(
    z,
    u,
    grad_a,
    grad_error,
    grad_state,
    row,
    to_weight,
    to_momentum,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Add the gradients of a layer's a and δ through the chunk's end (8); `to_*` are the decays of writes times rates.

    Return every token's aᵀ dW_C δ and aᵀ dS_C δ.
    """
    _, _, hidden, _ = shape
    along_weight, along_momentum = zero_vector(CUT.rows), zero_vector(CUT.rows)
    for column in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
        by_weight = errors_through(z, u, grad_state, row, column, layer, shape, CUT)
        by_momentum = errors_through(z, u, grad_state + state_size(shape), row, column, layer, shape, CUT)
        a = load_input(z, row, column, layer, shape, CUT)
        along_weight += tl.sum(a * by_weight, 1)
        along_momentum += tl.sum(a * by_momentum, 1)
        target = input_tile(grad_a, row, input_column(layer, shape) + column, shape, CUT)
        tl.store(target, tl.load(target) - by_weight * to_weight[:, None] - by_momentum * to_momentum[:, None])
    for column in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
        target = input_tile(grad_error, row, layer * hidden + column, shape, CUT)
        total = tl.load(target)
        total = _inputs_through(z, grad_state, total, to_weight, row, column, layer, shape, CUT)
        total = _inputs_through(z, grad_state + state_size(shape), total, to_momentum, row, column, layer, shape, CUT)
        tl.store(target, total)
    return along_weight, along_momentum


@triton.jit
@no_type_check
def _bound_backward(
    z,
    u,
    grad_a,
    grad_error,
    row,
    grad_norm,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Add the gradients of a layer's a and δ through ‖a‖² ‖δ‖² of (6)."""
    _, _, hidden, _ = shape
    of_input, of_error = squares(z, u, row, layer, shape, CUT)
    for column in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
        a = load_input(z, row, column, layer, shape, CUT)
        target = input_tile(grad_a, row, input_column(layer, shape) + column, shape, CUT)
        tl.store(target, tl.load(target) + 2 * a * (grad_norm * of_error)[:, None])
    for column in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
        error = load_error(z, u, row, column, layer, shape, CUT)
        target = input_tile(grad_error, row, layer * hidden + column, shape, CUT)
        tl.store(target, tl.load(target) + 2 * error * (grad_norm * of_input)[:, None])


@triton.jit
@no_type_check
def _rates_backward(
    z,
    u,
    vectors,
    decays,
    grad_vectors,
    grad_decays,
    grad_a,
    grad_error,
    grad_state,
    max_grad_norm,
    shape,
    CUT: tl.constexpr,
):
    """Backpropagate from the chunk's end to a, δ, theta and the last rows of the decays, through (8) and (6)."""
    depth, _, _, slots = shape
    for row in tl.range(0, slots, CUT.rows, disable_licm=True):
        # (8), backward: a, δ, rates and decays
        rate = tl.load(vector(vectors, RATE, row, shape, CUT))
        decay = tl.load(vector(decays, slots - 1, row, shape, CUT))
        momentum_decay = tl.load(vector(decays, 2 * slots - 1, row, shape, CUT))
        along_weight, along_momentum = zero_vector(CUT.rows), zero_vector(CUT.rows)
        for layer in tl.range(0, depth, disable_licm=True):
            by_weight, by_momentum = _write_backward(
                z, u, grad_a, grad_error, grad_state, row, rate * decay, rate * momentum_decay, layer, shape, CUT
            )
            along_weight += by_weight
            along_momentum += by_momentum
        store_sum(vector(grad_decays, slots - 1, row, shape, CUT), -rate * along_weight)
        tl.store(vector(grad_vectors, LAST_MOMENTA, row, shape, CUT), -rate * along_momentum)
        grad_rate = tl.load(vector(grad_vectors, RATE, row, shape, CUT))
        grad_rate -= decay * along_weight + momentum_decay * along_momentum
        tl.debug_barrier()
        # (6), backward: theta, and a and δ through the bound
        norm = gradient_norm(z, u, row, shape, CUT)
        least = max_grad_norm * max_grad_norm
        scale = max_grad_norm / tl.sqrt(tl.maximum(norm, least))
        # The square root has no gradient at 0, where the bound is inactive.
        theta = tl.load(vector(vectors, THETA, row, shape, CUT))
        grad_norm = tl.where(norm > least, -0.5 * grad_rate * theta * scale / tl.maximum(norm, least), 0.0)
        for layer in tl.range(0, depth, disable_licm=True):
            _bound_backward(z, u, grad_a, grad_error, row, grad_norm, layer, shape, CUT)
        grad_rate *= scale
        tl.store(vector(grad_vectors, THETA, row, shape, CUT), grad_rate)


@triton.jit
@no_type_check
def _climb(
    z,
    grad_error,
    anchor,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Add the gradient of a layer's δ through u of the previous layer (9)."""
    _, _, hidden, slots = shape
    for row in tl.range(0, slots, CUT.rows, disable_licm=True):
        for column in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
            target = input_tile(grad_error, row, layer * hidden + column, shape, CUT)
            total = tl.load(target)
            for inner in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
                grad_u = load_error(z, grad_error, row, inner, layer - 1, shape, CUT)
                weight = load_matrix(anchor, inner, column, layer, shape, CUT)
                total = tl.dot(grad_u, weight, total, input_precision=CUT.precision)
            tl.store(target, total)


@triton.jit
@no_type_check
def _load_grad_output(
    grad_a,
    grad_error,
    row,
    column,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Load dz, the gradient of a layer's output over the keys; at the last layer it is dδ because δ = k + z - v."""
    depth, _, hidden, _ = shape
    at = layer * hidden + column
    if layer == depth - 1:
        grad = tl.load(input_tile(grad_error, row, at, shape, CUT))
    else:
        grad = tl.load(input_tile(grad_a, row, at, shape, CUT))
    return grad


@triton.jit
@no_type_check
def _descend(
    z,
    u,
    grad_a,
    grad_error,
    anchor,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Backpropagate dz of a layer to da, and to dz of the previous layer through SiLU and its slope in δ (10)."""
    _, _, _, slots = shape
    for row in tl.range(0, slots, CUT.rows, disable_licm=True):
        for column in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
            at = input_column(layer, shape) + column
            target = input_tile(grad_a, row, at, shape, CUT)
            total = tl.load(target)
            for inner in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
                grad = _load_grad_output(grad_a, grad_error, row, inner, layer, shape, CUT)
                weight = load_matrix(anchor, column, inner, layer, shape, CUT)
                total = tl.dot(grad, tl.trans(weight), total, input_precision=CUT.precision)
            if layer > 0:
                before = tl.load(input_tile(z, row, at, shape, CUT))
                error = tl.load(input_tile(u, row, at, shape, CUT))
                grad = tl.load(input_tile(grad_error, row, at, shape, CUT))
                total = total * slope(before) + grad * error * curvature(before)
            tl.store(target, total)


@triton.jit
@no_type_check
def _of_queries(y, grad_y, vectors, total, WHICH: tl.constexpr, row, column, layer, shape, CUT: tl.constexpr):
    """Add a tile of the gradient of W_0 or S_0 through the chunk's queries (7); `WHICH` selects its decay."""
    _, _, hidden, slots = shape
    for source in tl.range(0, slots, CUT.rows, disable_licm=True):
        x = tl.trans(load_input(y, source, row, layer, shape, CUT))
        reach = tl.load(vector(vectors, WHICH, source, shape, CUT))[:, None]
        grad = tl.load(input_tile(grad_y, source, layer * hidden + column, shape, CUT)) * reach
        total = tl.dot(x, grad, total, input_precision=CUT.precision)
    return total


@triton.jit
@no_type_check
def _of_keys(z, u, grad_a, grad_error, row, column, layer, shape, CUT: tl.constexpr):
    """Compute a tile of the anchor's gradient (11) through the output and through u."""
    _, _, _, slots = shape
    total = zero_tile(CUT.tile, CUT.tile)
    for source in tl.range(0, slots, CUT.rows, disable_licm=True):
        a = tl.trans(load_input(z, source, row, layer, shape, CUT))
        grad = _load_grad_output(grad_a, grad_error, source, column, layer, shape, CUT)
        total = tl.dot(a, grad, total, input_precision=CUT.precision)
    if layer > 0:
        for source in tl.range(0, slots, CUT.rows, disable_licm=True):
            grad_u = tl.trans(load_error(z, grad_error, source, row, layer - 1, shape, CUT))
            error = load_error(z, u, source, column, layer, shape, CUT)
            total = tl.dot(grad_u, error, total, input_precision=CUT.precision)
    return total


@triton.jit
@no_type_check
def _state_backward(
    y,
    z,
    u,
    grad_y,
    grad_a,
    grad_error,
    vectors,
    state,
    grad_state,
    grad_anchor,
    grad_fresh,
    grad_end_anchor,
    begins,
    is_end_anchor,
    new_document,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Backpropagate a layer's state gradients from the chunk's end to its start, in place.

    Return the gradients of the decays of the initial state over the chunk: weights to weights, momenta to weights,
    momenta to momenta.
    """
    _, _, _, slots = shape
    last = slots - 1
    of_weight = tl.load(vectors + OF_WEIGHT * slots + last)
    of_momentum = tl.load(vectors + OF_MOMENTUM * slots + last)
    momentum_kept = tl.load(vectors + MOMENTUM_KEPT * slots + last)
    grad_of_weight, grad_of_momentum = zero_vector(CUT.tile), zero_vector(CUT.tile)
    grad_momentum_kept = zero_vector(CUT.tile)
    stride = output_width(layer, shape)
    for row in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
        for column in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
            at = tile(tl.cast(matrix_start(layer, shape), tl.int32), row, column, stride, CUT.tile, CUT.tile)
            grad_weight, grad_momentum = tl.load(grad_state + at), tl.load(grad_state + state_size(shape) + at)
            weight, momentum = tl.load(state + at), tl.load(state + state_size(shape) + at)
            # (8), backward: the decays of the initial state, then W_0 and S_0, which queries also read (7)
            grad_of_weight += tl.sum(grad_weight * weight, 0)
            grad_of_momentum += tl.sum(grad_weight * momentum, 0)
            grad_momentum_kept += tl.sum(grad_momentum * momentum, 0)
            grad_momentum = grad_momentum * momentum_kept + grad_weight * of_momentum
            grad_momentum = _of_queries(y, grad_y, vectors, grad_momentum, OF_MOMENTUM, row, column, layer, shape, CUT)
            tl.store(grad_state + state_size(shape) + at, tl.where(new_document, 0.0, grad_momentum))
            grad_weight = _of_queries(
                y, grad_y, vectors, grad_weight * of_weight, OF_WEIGHT, row, column, layer, shape, CUT
            )
            # (11): the anchor's gradient, to W_0 or the given anchors; at a document's start, to the fresh weights
            grad_gradients = _of_keys(z, u, grad_a, grad_error, row, column, layer, shape, CUT)
            tl.store(grad_anchor + at, grad_gradients, mask=tile_mask(begins == 0, CUT.tile, CUT.tile))
            grad_weight += tl.where(begins, grad_gradients, 0.0)
            grad_weight += tl.load(grad_end_anchor + at, mask=tile_mask(is_end_anchor, CUT.tile, CUT.tile), other=0)
            grad_before = tl.load(grad_fresh + at, mask=tile_mask(new_document, CUT.tile, CUT.tile), other=0)
            tl.store(grad_fresh + at, grad_before + grad_weight, mask=tile_mask(new_document, CUT.tile, CUT.tile))
            tl.store(grad_state + at, tl.where(new_document, 0.0, grad_weight))
    return tl.sum(grad_of_weight, 0), tl.sum(grad_of_momentum, 0), tl.sum(grad_momentum_kept, 0)


@triton.jit(do_not_specialize=["heads", "blocks", "depth", "width", "hidden", "slots"])
@no_type_check
def scan_backward_kernel(
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
    grad_state_ptr,
    grad_anchor_ptr,
    grad_fresh_ptr,
    grad_end_anchor_ptr,
    begins_ptr,
    new_document_ptr,
    end_anchor_ptr,
    max_grad_norm,
    heads,
    blocks,
    depth,
    width,
    hidden,
    slots,
    CUT: tl.constexpr,
):
    """Scan one lane in reverse; grad_state changes from the final state's gradient to the initial state's gradient."""
    shape = (depth, width, hidden, slots)
    lane = tl.program_id(0).to(tl.int64)
    batch = lane // heads
    states_ptr += lane * (blocks + 2) * (2 * state_size(shape))
    grad_state_ptr += lane * (2 * state_size(shape))
    grad_anchor_ptr += lane * state_size(shape)
    grad_fresh_ptr += lane * state_size(shape)
    grad_end_anchor_ptr += lane * state_size(shape)
    end_anchor = tl.load(end_anchor_ptr + batch)
    for step in tl.range(0, blocks, disable_licm=True):
        block = blocks - 1 - step
        chunk = lane * blocks + block
        rows_at = chunk * (slots * row_size(shape))
        y, z, u, grad_y = y_ptr + rows_at, z_ptr + rows_at, u_ptr + rows_at, grad_y_ptr + rows_at
        grad_a, grad_error = grad_a_ptr + rows_at, grad_error_ptr + rows_at
        vectors, grad_vectors = (
            vectors_ptr + chunk * (VECTORS * slots),
            grad_vectors_ptr + chunk * (VECTORS * slots),
        )
        decays, grad_decays = (
            decays_ptr + chunk * (2 * slots * slots),
            grad_decays_ptr + chunk * (slots * slots),
        )
        begins = (block > 0) | (tl.load(begins_ptr + batch * blocks + block) != 0)
        new_document = tl.load(new_document_ptr + batch * blocks + block) != 0
        anchor = states_ptr + tl.cast(tl.where(begins, block, blocks + 1), tl.int64) * (2 * state_size(shape))
        _rates_backward(
            z,
            u,
            vectors,
            decays,
            grad_vectors,
            grad_decays,
            grad_a,
            grad_error,
            grad_state_ptr,
            max_grad_norm,
            shape,
            CUT,
        )
        tl.debug_barrier()
        # (9), then (10)
        for layer in tl.range(1, depth, disable_licm=True):
            _climb(z, grad_error, anchor, layer, shape, CUT)
            tl.debug_barrier()
        for back in tl.range(1, depth + 1, disable_licm=True):
            _descend(z, u, grad_a, grad_error, anchor, depth - back, shape, CUT)
            tl.debug_barrier()
        # (8) and (11): the state before the chunk, and the anchor
        grad_of_weight, grad_of_momentum, grad_momentum_kept = 0.0, 0.0, 0.0
        for layer in tl.range(0, depth, disable_licm=True):
            of_weight, of_momentum, momentum_kept = _state_backward(
                y,
                z,
                u,
                grad_y,
                grad_a,
                grad_error,
                vectors,
                states_ptr + tl.cast(block, tl.int64) * (2 * state_size(shape)),
                grad_state_ptr,
                grad_anchor_ptr,
                grad_fresh_ptr,
                grad_end_anchor_ptr,
                begins,
                block == end_anchor,
                new_document,
                layer,
                shape,
                CUT,
            )
            grad_of_weight += of_weight
            grad_of_momentum += of_momentum
            grad_momentum_kept += momentum_kept
        last = slots - 1
        store_sum(grad_vectors + OF_WEIGHT * slots + last, grad_of_weight)
        store_sum(grad_vectors + OF_MOMENTUM * slots + last, grad_of_momentum)
        tl.store(grad_vectors + MOMENTUM_KEPT * slots + last, grad_momentum_kept)
        tl.debug_barrier()
