"""Memory layout of a chunk, and building blocks of the kernels for its tiles. Equation numbers refer to README.md.

A program works on a (batch, head) lane or on one chunk of a lane. Every operand of a matrix product is in float32
scratch memory, padded with zeros to whole tiles, so products need no masks. A chunk has four kinds of scratch:

    rows      (slots, columns)     one row per token, with the outputs of all layers in order. No layer reads the last
                                   output; where inputs are stored, the input of the first layer takes its place.
    vectors   (VECTORS, slots)     one number per token: gates and decays
    decays    (2, slots, slots)    D of weights and of momenta (decays.py)
    state     (2, state_size)      weights, then momenta, with the layers concatenated
"""

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl


class Cut(NamedTuple):
    """Compile-time constants of the kernels; the memory's sizes are arguments instead.

    Args:
        rows, tile: tokens and columns of a tile.
        precision: precision of operands in matrix products.
    """

    rows: int
    tile: int
    precision: str


# Indices of a chunk's vectors, and of their gradients.
KEEP = tl.constexpr(0)
ETA = tl.constexpr(1)
ACTIVE = tl.constexpr(2)
THETA = tl.constexpr(3)
RATE = tl.constexpr(4)  # theta, including the gradient bound
OF_WEIGHT = tl.constexpr(5)  # share of the chunk's initial weights in a token's weights
OF_MOMENTUM = tl.constexpr(6)  # share of the chunk's initial momenta in a token's weights
MOMENTUM_KEPT = tl.constexpr(7)  # share of the chunk's initial momenta in a token's momenta
LAST_MOMENTA = tl.constexpr(8)  # gradient of the last row of the momenta's decays
VECTORS = tl.constexpr(9)


@triton.jit
@no_type_check
def row_size(shape):
    """Return the number of elements in a row."""
    depth, width, hidden, _ = shape
    return tl.multiple_of((depth - 1) * hidden + width, 16)


@triton.jit
@no_type_check
def state_size(shape):
    """Return the number of elements in the weights of one lane."""
    depth, width, hidden, _ = shape
    return tl.multiple_of(2 * width * hidden + (depth - 2) * hidden * hidden, 16)


@triton.jit
@no_type_check
def input_width(layer, shape):
    """Return the number of input columns of a layer."""
    _, width, hidden, _ = shape
    return tl.multiple_of(tl.where(layer == 0, width, hidden), 16)


@triton.jit
@no_type_check
def output_width(layer, shape):
    """Return the number of output columns of a layer."""
    depth, width, hidden, _ = shape
    return tl.multiple_of(tl.where(layer == depth - 1, width, hidden), 16)


@triton.jit
@no_type_check
def input_column(layer, shape):
    """Return the start of a layer's input in a row: the previous layer's output. Outputs start at layer * hidden."""
    depth, _, hidden, _ = shape
    return tl.where(layer == 0, depth - 1, layer - 1) * hidden


@triton.jit
@no_type_check
def matrix_start(layer, shape):
    """Return the offset of a layer's matrix in a state."""
    _, width, hidden, _ = shape
    return tl.where(layer == 0, 0, width * hidden + (layer - 1) * hidden * hidden)


@triton.jit
@no_type_check
def tile(ptr, row, column, stride, HEIGHT: tl.constexpr, LENGTH: tl.constexpr):
    """Return pointers to a tile of a matrix in scratch, with 16-byte aligned rows."""
    corner = tl.multiple_of(ptr + row * stride + column, 16)
    return corner + tl.arange(0, HEIGHT)[:, None] * stride + tl.arange(0, LENGTH)[None, :]


@triton.jit
@no_type_check
def vector(ptr, index, row, shape, CUT: tl.constexpr):
    """Return pointers to a piece of one of a chunk's vectors."""
    _, _, _, slots = shape
    return tl.multiple_of(ptr + index * slots + row, 16) + tl.arange(0, CUT.rows)


@triton.jit
@no_type_check
def zero_vector(LENGTH: tl.constexpr):
    """Return a vector of zeros; Triton 3.7 accepts fields of a `Cut` as shapes only if they are passed as arguments."""
    return tl.zeros((LENGTH,), tl.float32)


@triton.jit
@no_type_check
def zero_tile(HEIGHT: tl.constexpr, LENGTH: tl.constexpr):
    """Return a tile of zeros."""
    return tl.zeros((HEIGHT, LENGTH), tl.float32)


@triton.jit
@no_type_check
def tile_mask(condition, HEIGHT: tl.constexpr, LENGTH: tl.constexpr):
    """Broadcast one condition to a mask for a whole tile."""
    return tl.full((HEIGHT, LENGTH), 1, tl.int1) & condition


@triton.jit
@no_type_check
def slope(x):
    """Return the derivative of SiLU."""
    gate = tl.sigmoid(x)
    return gate * (1 + x * (1 - gate))


@triton.jit
@no_type_check
def curvature(x):
    """Return the second derivative of SiLU."""
    gate = tl.sigmoid(x)
    return gate * (1 - gate) * (2 + x * (1 - 2 * gate))


@triton.jit
@no_type_check
def input_tile(
    ptr,
    row,
    column,
    shape,
    CUT: tl.constexpr,
):
    """Return pointers to a tile of rows, with `column` counted from the row's start."""
    return tile(ptr, row, column, row_size(shape), CUT.rows, CUT.tile)


@triton.jit
@no_type_check
def store_sum(target, value, first=False):
    """Add `value` to the target, or overwrite the uninitialised target if `first`."""
    before = tl.load(target)
    tl.store(target, tl.where(first, value, value + before))


@triton.jit
@no_type_check
def load_input(
    x_ptr,
    row,
    column,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Load a layer's input: SiLU of the previous layer's output."""
    x = tl.load(input_tile(x_ptr, row, input_column(layer, shape) + column, shape, CUT))
    return tl.where(layer > 0, x * tl.sigmoid(x), x)


@triton.jit
@no_type_check
def load_error(
    z_ptr,
    u_ptr,
    row,
    column,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Load δ (5), the error at a layer's output z; u is the error after its SiLU."""
    depth, _, hidden, _ = shape
    error = tl.load(input_tile(u_ptr, row, layer * hidden + column, shape, CUT))
    z = tl.load(input_tile(z_ptr, row, layer * hidden + column, shape, CUT))
    return tl.where(layer < depth - 1, error * slope(z), error)


@triton.jit
@no_type_check
def load_matrix(
    state_ptr,
    row,
    column,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Load a tile of a layer's matrix."""
    start = matrix_start(layer, shape)
    return tl.load(tile(state_ptr + start, row, column, output_width(layer, shape), CUT.tile, CUT.tile))


@triton.jit
@no_type_check
def errors_through(z_ptr, u_ptr, matrix_ptr, row, column, layer, shape, CUT: tl.constexpr):
    """Multiply a tile of a layer's δ by a transposed matrix."""
    total = zero_tile(CUT.rows, CUT.tile)
    for inner in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
        error = load_error(z_ptr, u_ptr, row, inner, layer, shape, CUT)
        matrix = load_matrix(matrix_ptr, column, inner, layer, shape, CUT)
        total = tl.dot(error, tl.trans(matrix), total, input_precision=CUT.precision)
    return total


@triton.jit
@no_type_check
def squares(
    z_ptr,
    u_ptr,
    row,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Compute every token's ‖a‖² and ‖δ‖² at a layer."""
    of_input, of_error = zero_vector(CUT.rows), zero_vector(CUT.rows)
    for column in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
        a = load_input(z_ptr, row, column, layer, shape, CUT)
        of_input += tl.sum(a * a, 1)
    for column in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
        error = load_error(z_ptr, u_ptr, row, column, layer, shape, CUT)
        of_error += tl.sum(error * error, 1)
    return of_input, of_error


@triton.jit
@no_type_check
def gradient_norm(
    z_ptr,
    u_ptr,
    row,
    shape,
    CUT: tl.constexpr,
):
    """Compute the squared norm of every token's gradient, over all layers (6)."""
    depth, _, _, _ = shape
    norm = zero_vector(CUT.rows)
    for layer in tl.range(0, depth, disable_licm=True):
        of_input, of_error = squares(z_ptr, u_ptr, row, layer, shape, CUT)
        norm += of_input * of_error
    return norm


@triton.jit
@no_type_check
def _forward(
    z_ptr,
    u_ptr,
    anchor_ptr,
    layer,
    shape,
    CUT: tl.constexpr,
):
    depth, _, hidden, slots = shape
    for row in tl.range(0, slots, CUT.rows, disable_licm=True):
        for column in tl.range(0, output_width(layer, shape), CUT.tile, disable_licm=True):
            total = zero_tile(CUT.rows, CUT.tile)
            for inner in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
                a = load_input(z_ptr, row, inner, layer, shape, CUT)
                anchor = load_matrix(anchor_ptr, inner, column, layer, shape, CUT)
                total = tl.dot(a, anchor, total, input_precision=CUT.precision)
            if layer < depth - 1:
                tl.store(input_tile(z_ptr, row, layer * hidden + column, shape, CUT), total)
            else:
                target = input_tile(u_ptr, row, layer * hidden + column, shape, CUT)
                tl.store(target, tl.load(target) + total)


@triton.jit
@no_type_check
def _backward(
    z_ptr,
    u_ptr,
    anchor_ptr,
    layer,
    shape,
    CUT: tl.constexpr,
):
    _, _, hidden, slots = shape
    for row in tl.range(0, slots, CUT.rows, disable_licm=True):
        for column in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
            total = errors_through(z_ptr, u_ptr, anchor_ptr, row, column, layer, shape, CUT)
            tl.store(input_tile(u_ptr, row, (layer - 1) * hidden + column, shape, CUT), total)


@triton.jit
@no_type_check
def surprise(
    z_ptr,
    u_ptr,
    anchor_ptr,
    vectors_ptr,
    max_grad_norm,
    shape,
    CUT: tl.constexpr,
):
    """Run the MLP over a chunk's keys at its anchors, forward and backward, to fill z, u and the rates.

    On entry, z holds the keys in place of the first layer's input, and u holds k - v in place of the last output.
    """
    depth, _, _, slots = shape
    # (5): z of every layer, and k + z - v at the last
    for layer in tl.range(0, depth, disable_licm=True):
        _forward(z_ptr, u_ptr, anchor_ptr, layer, shape, CUT)
        tl.debug_barrier()  # other threads read the stored values
    # (5): u of every hidden layer
    for back in range(1, depth):
        _backward(z_ptr, u_ptr, anchor_ptr, depth - back, shape, CUT)
        tl.debug_barrier()
    # (6): rates
    for row in tl.range(0, slots, CUT.rows, disable_licm=True):
        norm = gradient_norm(z_ptr, u_ptr, row, shape, CUT)
        rate = tl.load(vector(vectors_ptr, THETA, row, shape, CUT))
        rate *= max_grad_norm / tl.sqrt(tl.maximum(norm, max_grad_norm * max_grad_norm))
        tl.store(vector(vectors_ptr, RATE, row, shape, CUT), rate)
    tl.debug_barrier()


@triton.jit
@no_type_check
def _queries_through(y_ptr, state_ptr, total, scale, row, column, layer, shape, CUT: tl.constexpr):
    for inner in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
        x = load_input(y_ptr, row, inner, layer, shape, CUT) * scale
        matrix = load_matrix(state_ptr, inner, column, layer, shape, CUT)
        total = tl.dot(x, matrix, total, input_precision=CUT.precision)
    return total


@triton.jit
@no_type_check
def read(
    y_ptr,
    z_ptr,
    u_ptr,
    state_ptr,
    vectors_ptr,
    decays_ptr,
    row,
    column,
    layer,
    shape,
    CUT: tl.constexpr,
):
    """Compute a tile of a layer's answers X W_i (7)."""
    _, _, _, slots = shape
    of_weight = tl.load(vector(vectors_ptr, OF_WEIGHT, row, shape, CUT))[:, None]
    of_momentum = tl.load(vector(vectors_ptr, OF_MOMENTUM, row, shape, CUT))[:, None]
    # R_w[i, 0] X W_0 + R_w[i, 1] X S_0
    total = zero_tile(CUT.rows, CUT.tile)
    total = _queries_through(y_ptr, state_ptr, total, of_weight, row, column, layer, shape, CUT)
    total = _queries_through(y_ptr, state_ptr + state_size(shape), total, of_momentum, row, column, layer, shape, CUT)
    # - ((D ⊙ X aᵀ) r) δ
    for source in tl.range(0, slots, CUT.rows, disable_licm=True):
        scores = zero_tile(CUT.rows, CUT.rows)
        for inner in tl.range(0, input_width(layer, shape), CUT.tile, disable_licm=True):
            x = load_input(y_ptr, row, inner, layer, shape, CUT)
            a = load_input(z_ptr, source, inner, layer, shape, CUT)
            scores = tl.dot(x, tl.trans(a), scores, input_precision=CUT.precision)
        rate = tl.load(vector(vectors_ptr, RATE, source, shape, CUT))
        scores *= -rate[None, :] * tl.load(tile(decays_ptr, row, source, slots, CUT.rows, CUT.rows))
        error = load_error(z_ptr, u_ptr, source, column, layer, shape, CUT)
        total = tl.dot(scores, error, total, input_precision=CUT.precision)
    return total
