"""Building blocks of the kernels: products, loads and stores of one chunk, and the triangular inverse in registers.

Symbols and equation numbers refer to README.md. A chunk has at most 64 tokens here; the last chunk of a row is padded
with tokens that have no effect. `gates_ptr` is (gate, lane, time) with the gates in the order of `Gates`; a lane is a
(batch, head) pair.
"""

from typing import no_type_check

import triton
import triton.language as tl

COUNTS = ("lanes", "heads", "time", "chunks", "checkpoints")  # arguments that never trigger a new compilation

KEEP = tl.constexpr(0)
ETA = tl.constexpr(1)
THETA = tl.constexpr(2)
ACTIVE = tl.constexpr(3)
CONTINUES = tl.constexpr(4)

# Rows of `columns_ptr`, each a vector over the chunk's tokens: the shares of W_0 and S_0 in W_i (a, p), of S_0 in S_i
# (e), of W_0 and S_0 in the weights at which token i takes its error, and of token j's write in W_C and in S_C.
WEIGHT_LEFT = tl.constexpr(0)
MOMENTUM_LEFT = tl.constexpr(1)
MOMENTUM_KEPT = tl.constexpr(2)
WEIGHT_FOUND = tl.constexpr(3)
MOMENTUM_FOUND = tl.constexpr(4)
WRITE_LEFT = tl.constexpr(5)
WRITE_MOVING = tl.constexpr(6)
COLUMNS = tl.constexpr(7)

BASE = tl.constexpr(16)  # size of the diagonal blocks that are inverted by substitution


@triton.jit
@no_type_check
def dot(a, b, PRECISION: tl.constexpr):
    """Multiply matrices with float32 sums: two 16-bit inputs directly, which is exact, others at PRECISION."""
    if a.dtype == b.dtype and a.dtype != tl.float32 and PRECISION != "ieee":
        product = tl.dot(a, b)
    elif PRECISION is None:  # omitted, because an explicit value would not select tf32 on AMD
        product = tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return product


@triton.jit
@no_type_check
def load_tile(base_ptr, rows, columns, stride, row_count, column_count):
    """Load a tile of a matrix, with zeros outside its bounds."""
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(base_ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def store_tile(base_ptr, rows, columns, stride, row_count, column_count, tile):
    """Store a tile of a matrix in the matrix's dtype, ignoring elements outside its bounds."""
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    tl.store(base_ptr + rows[:, None] * stride + columns[None, :], tile.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def store_square(matrices_ptr, unit, tile, SIZE: tl.constexpr):
    """Store a chunk's (SIZE, SIZE) matrix."""
    i = tl.arange(0, SIZE)
    tl.store(matrices_ptr + unit * SIZE * SIZE + i[:, None] * SIZE + i[None, :], tile)


@triton.jit
@no_type_check
def load_square(matrices_ptr, unit, SIZE: tl.constexpr):
    """Load a chunk's (SIZE, SIZE) matrix."""
    i = tl.arange(0, SIZE)
    return tl.load(matrices_ptr + unit * SIZE * SIZE + i[:, None] * SIZE + i[None, :])


@triton.jit
@no_type_check
def lane_start(base_ptr, lane, heads, batch_stride, head_stride):
    """Return the pointer to the first token of a lane."""
    return base_ptr + (lane // heads) * batch_stride + (lane % heads) * head_stride


@triton.jit
@no_type_check
def load_rows(rows_ptr, unit, first, SIZE: tl.constexpr):
    """Load a chunk's decay rows from `first` on: 0 selects the rows before each token's write, 1 those after it."""
    i = tl.arange(0, SIZE)
    return tl.load(rows_ptr + (unit * (SIZE + 1) + first + i[:, None]) * SIZE + i[None, :])


@triton.jit
@no_type_check
def load_column(columns_ptr, unit, COLUMN: tl.constexpr, SIZE: tl.constexpr):
    """Load one row of `columns_ptr`."""
    return tl.load(columns_ptr + (unit * COLUMNS + COLUMN) * SIZE + tl.arange(0, SIZE))


@triton.jit
@no_type_check
def store_column(columns_ptr, unit, COLUMN: tl.constexpr, values, SIZE: tl.constexpr):
    """Store one row of `columns_ptr`."""
    tl.store(columns_ptr + (unit * COLUMNS + COLUMN) * SIZE + tl.arange(0, SIZE), values)


@triton.jit
@no_type_check
def load_carry(columns_ptr, unit, SIZE: tl.constexpr):
    """Load (a_C, p_C, e_C) of F (9), the transition of weights and momentum over a chunk."""
    last_ptr = columns_ptr + unit * COLUMNS * SIZE + SIZE - 1
    return (
        tl.load(last_ptr + WEIGHT_LEFT * SIZE),
        tl.load(last_ptr + MOMENTUM_LEFT * SIZE),
        tl.load(last_ptr + MOMENTUM_KEPT * SIZE),
    )


@triton.jit
@no_type_check
def copy_state(
    weight_ptr, momentum_ptr, z_ptr, values, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr
):
    """Copy columns of weights and momentum to z."""
    for low in range(0, KEY_DIM, KEY_BLOCK):
        dims = low + tl.arange(0, KEY_BLOCK)
        weight = load_tile(weight_ptr, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
        store_tile(z_ptr, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM, weight)
        momentum = load_tile(momentum_ptr, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
        store_tile(z_ptr + KEY_DIM * VALUE_DIM, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM, momentum)


@triton.jit
@no_type_check
def through_state(
    x_ptr,
    stride,
    row_count,
    z_ptr,
    values,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute (X W, X S) from a chunk's keys or queries and a block of columns of z."""
    i = tl.arange(0, SIZE)
    by_weight = tl.zeros((SIZE, VALUE_BLOCK), tl.float32)
    by_momentum = tl.zeros((SIZE, VALUE_BLOCK), tl.float32)
    for low in range(0, KEY_DIM, KEY_BLOCK):
        dims = low + tl.arange(0, KEY_BLOCK)
        x = load_tile(x_ptr, i, dims, stride, row_count, KEY_DIM)
        weight = load_tile(z_ptr, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
        by_weight += dot(x, weight, PRECISION)
        momentum = load_tile(z_ptr + KEY_DIM * VALUE_DIM, dims, values, VALUE_DIM, KEY_DIM, VALUE_DIM)
        by_momentum += dot(x, momentum, PRECISION)
    return by_weight, by_momentum


@triton.jit
@no_type_check
def diagonal_blocks(matrix, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Extract (SIZE / WIDTH, WIDTH, WIDTH) diagonal blocks; tiles have no slices, so masked blocks are summed."""
    BLOCKS: tl.constexpr = SIZE // WIDTH
    b = tl.arange(0, BLOCKS)
    diagonal = (b[:, None] == b[None, :])[:, None, :, None]
    return tl.sum(tl.where(diagonal, tl.reshape(matrix, (BLOCKS, WIDTH, BLOCKS, WIDTH)), 0.0), axis=2)


@triton.jit
@no_type_check
def substitute(blocks, BLOCKS: tl.constexpr):
    """Invert I + `blocks`, strictly lower triangular matrices of BASE rows, by eliminating columns one by one."""
    i = tl.arange(0, BASE)
    row, column = i[None, :, None], i[None, None, :]
    inverse = tl.where(row == column, 1.0, 0.0) + tl.zeros((BLOCKS, BASE, BASE), tl.float32)
    for step in range(BASE - 1):
        done = tl.sum(tl.where(row == step, inverse, 0.0), axis=1)
        weights = tl.sum(tl.where(column == step, blocks, 0.0), axis=2)
        inverse -= weights[:, :, None] * done[:, None, :]
    return inverse


@triton.jit
@no_type_check
def merge_pairs(inverse, strict, PAIRS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Merge the inverses of 2 PAIRS diagonal blocks into the inverses of PAIRS blocks of twice the width."""
    half = tl.arange(0, 2)[None, :, None, None]
    halves = tl.reshape(inverse, (PAIRS, 2, WIDTH, WIDTH))
    top = tl.sum(tl.where(half == 0, halves, 0.0), axis=1)
    bottom = tl.sum(tl.where(half == 1, halves, 0.0), axis=1)
    blocks = diagonal_blocks(strict, PAIRS * 2 * WIDTH, 2 * WIDTH)
    row, column = tl.arange(0, 2)[None, :, None, None, None], tl.arange(0, 2)[None, None, None, :, None]
    is_below = (row == 1) & (column == 0)
    blocks = tl.reshape(blocks, (PAIRS, 2, WIDTH, 2, WIDTH))
    below = tl.sum(tl.sum(tl.where(is_below, blocks, 0.0), axis=3), axis=1)
    below = -dot(bottom, dot(below, top, PRECISION), PRECISION)
    merged = tl.where(row == column, halves[:, :, :, None, :], 0.0)
    merged = tl.where(is_below, below[:, None, :, None, :], merged)
    return tl.reshape(merged, (PAIRS, 2 * WIDTH, 2 * WIDTH))


@triton.jit
@no_type_check
def unit_lower_inverse(strict, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Compute (I + N)^-1 for strictly lower triangular N = `strict`, as stably as substitution (see triangular.py).

    Diagonal blocks are inverted by substitution and merged: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]].
    """
    inverse = substitute(diagonal_blocks(strict, SIZE, BASE), SIZE // BASE)
    if SIZE > BASE:
        inverse = merge_pairs(inverse, strict, SIZE // (2 * BASE), BASE, PRECISION)
    if SIZE > 2 * BASE:
        inverse = merge_pairs(inverse, strict, SIZE // (4 * BASE), 2 * BASE, PRECISION)
    return tl.reshape(inverse, (SIZE, SIZE))
