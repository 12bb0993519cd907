"""Forward kernels: one program per lane scans the weights from chunk to chunk, then all answers are read in parallel.

Equation numbers refer to README.md.
"""

from typing import no_type_check

import triton
import triton.language as tl

from .triton_tiles import (
    MOMENTUM_KEPT,
    OF_MOMENTUM,
    OF_WEIGHT,
    RATE,
    VECTORS,
    input_tile,
    input_width,
    load_error,
    load_input,
    matrix_start,
    output_width,
    read,
    row_size,
    state_size,
    surprise,
    tile,
    tile_mask,
    vector,
)
from .triton_tokens import store_tokens, token_slots


@triton.jit
@no_type_check
def _add_writes(z_ptr, u_ptr, vectors_ptr, decays_ptr, total, decay_row, row, column, layer, shape, CUT: tl.constexpr):
    """Add a tile of the chunk's writes, -(a ⊙ decays r)ᵀ δ of (8), decayed by `decay_row`."""
    _, _, _, slots = shape
    for source in tl.range(0, slots, CUT.rows, disable_licm=True):
        a = tl.trans(load_input(z_ptr, source, row, layer, shape, CUT))
        rate = -tl.load(vector(vectors_ptr, RATE, source, shape, CUT)) * tl.load(
            vector(decays_ptr, decay_row, source, shape, CUT)
        )
        error = load_error(z_ptr, u_ptr, source, column, layer, shape, CUT) * rate[:, None]
        total = tl.dot(a, error, total, input_precision=CUT.precision)
    return total


@triton.jit
@no_type_check
def _write(
    z_ptr,
    u_ptr,
    start_ptr,
    end_ptr,
    fresh_ptr,
    new_document,
    vectors_ptr,
    decays_ptr,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Store a layer's weights and momenta at the chunk's end, or fresh ones if the next chunk starts a document."""
    _, _, _, slots = shape
    last = slots - 1
    of_weight = tl.load(vectors_ptr + OF_WEIGHT * slots + last)
    of_momentum = tl.load(vectors_ptr + OF_MOMENTUM * slots + last)
    momentum_kept = tl.load(vectors_ptr + MOMENTUM_KEPT * slots + last)
    stride = output_width(layer, shape)
    momenta = matrix_start(layer, shape) + state_size(shape)
    for row in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
        for column in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
            weight = tl.load(tile(start_ptr + matrix_start(layer, shape), row, column, stride, CUT.tile, CUT.tile))
            momentum = tl.load(tile(start_ptr + momenta, row, column, stride, CUT.tile, CUT.tile))
            # (8): W_C and S_C
            weight = weight * of_weight + momentum * of_momentum
            momentum = momentum * momentum_kept
            weight = _add_writes(z_ptr, u_ptr, vectors_ptr, decays_ptr, weight, last, row, column, layer, shape, CUT)
            momentum = _add_writes(
                z_ptr, u_ptr, vectors_ptr, decays_ptr, momentum, slots + last, row, column, layer, shape, CUT
            )
            fresh_at = tile(fresh_ptr + matrix_start(layer, shape), row, column, stride, CUT.tile, CUT.tile)
            fresh = tl.load(fresh_at, mask=tile_mask(new_document, CUT.tile, CUT.tile), other=0)
            weight = tl.where(new_document, fresh, weight)
            momentum = tl.where(new_document, 0.0, momentum)
            tl.store(tile(end_ptr + matrix_start(layer, shape), row, column, stride, CUT.tile, CUT.tile), weight)
            tl.store(tile(end_ptr + momenta, row, column, stride, CUT.tile, CUT.tile), momentum)


@triton.jit(do_not_specialize=["heads", "blocks", "depth", "width", "hidden", "slots"])
@no_type_check
def scan_kernel(
    z_ptr,
    u_ptr,
    vectors_ptr,
    decays_ptr,
    states_ptr,
    fresh_ptr,
    begins_ptr,
    new_document_ptr,
    max_grad_norm,
    heads,
    blocks,
    depth,
    width,
    hidden,
    slots,
    CUT: tl.constexpr,
):
    """Scan one lane chunk by chunk.

    State n is the initial state of chunk n, and the second to last state is the final one. The last state holds the
    anchors of a first chunk that an earlier call has begun.
    """
    shape = (depth, width, hidden, slots)
    lane = tl.program_id(0).to(tl.int64)
    batch = lane // heads
    states_ptr += lane * (blocks + 2) * (2 * state_size(shape))
    fresh_ptr += lane % heads * state_size(shape)
    for block in tl.range(0, blocks, disable_licm=True):
        chunk = lane * blocks + block
        z, u = (
            z_ptr + chunk * (slots * row_size(shape)),
            u_ptr + chunk * (slots * row_size(shape)),
        )
        vectors, decays = vectors_ptr + chunk * (VECTORS * slots), decays_ptr + chunk * (2 * slots * slots)
        start = states_ptr + tl.cast(block, tl.int64) * (2 * state_size(shape))
        begins = (block > 0) | (tl.load(begins_ptr + batch * blocks + block) != 0)
        anchor = tl.cast(tl.where(begins, block, blocks + 1), tl.int64)
        # (5), (6): the gradients of the chunk's tokens
        surprise(z, u, states_ptr + anchor * (2 * state_size(shape)), vectors, max_grad_norm, shape, CUT)
        following = block + 1 < blocks
        new_document = tl.load(new_document_ptr + batch * blocks + block + 1, mask=following, other=0) != 0
        # (8): the initial state of the next chunk
        for layer in tl.range(0, depth, disable_licm=True):
            _write(
                z, u, start, start + 2 * state_size(shape), fresh_ptr, new_document, vectors, decays, layer, shape, CUT
            )
        tl.debug_barrier()


@triton.jit(do_not_specialize=["time", "heads", "blocks", "used", "depth", "width", "hidden", "slots"])
@no_type_check
def read_kernel(
    y_ptr,
    z_ptr,
    u_ptr,
    vectors_ptr,
    decays_ptr,
    states_ptr,
    times_ptr,
    valid_ptr,
    out_ptr,
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
    """Compute the answers to CUT.rows queries of one chunk, layer by layer."""
    shape = (depth, width, hidden, slots)
    program, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * CUT.rows
    lane, block = program // blocks, program % blocks
    y = y_ptr + program * (slots * row_size(shape))
    z = z_ptr + program * (slots * row_size(shape))
    u = u_ptr + program * (slots * row_size(shape))
    vectors, decays = vectors_ptr + program * (VECTORS * slots), decays_ptr + program * (2 * slots * slots)
    state = states_ptr + (lane * (blocks + 2) + block) * (2 * state_size(shape))
    times, valid = token_slots(times_ptr, valid_ptr, lane // heads * blocks + block, row, used, CUT)
    # (7), and (4) at the last layer
    for layer in tl.range(0, depth, disable_licm=True):
        for column in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
            answer = read(y, z, u, state, vectors, decays, row, column, layer, shape, CUT)
            if layer < depth - 1:
                tl.store(input_tile(y, row, layer * hidden + column, shape, CUT), answer)
            else:
                answer += tl.load(input_tile(y, row, (depth - 1) * hidden + column, shape, CUT))
                store_tokens(out_ptr + lane * time * dim, times, valid, column, answer, dim, CUT)
        tl.debug_barrier()
