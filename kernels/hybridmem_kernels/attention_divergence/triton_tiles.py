"""Building blocks of the kernels: the arguments of a policy, and one tile of queries against keys.

Query i has the position i + keys - queries; key j is column `persistent` + j of k. Logarithms of sums are to the base
2, because the hardware's exponential is; entropies and divergences are natural. Equations are those of README.md.
"""

from typing import Any, NamedTuple, no_type_check

import triton
import triton.language as tl

from .reference import FLOOR

LEAST_PROBABILITY = tl.constexpr(FLOOR)
TINY = tl.constexpr(1.1754943508222875e-38)  # float32's smallest normal number
LOWEST = tl.constexpr(-3.4028234663852886e38)  # and its lowest


class Vectors(NamedTuple):
    """Pointers to the queries and keys of one policy."""

    q_ptr: Any
    k_ptr: Any


class Strides(NamedTuple):
    """Strides of the queries and keys of one policy.

    Triton ignores do_not_specialize for the fields of a tuple. So lengths and windows, which a kernel must not be
    compiled for again, are arguments of their own.
    """

    q_batch: Any
    q_head: Any
    q_time: Any
    k_batch: Any
    k_head: Any
    k_time: Any


class Cut(NamedTuple):
    """Compile-time constants of a policy.

    Args:
        dim: of a head.
        width: the same, padded to a power of two.
        chunk: dimensions that a product of scores takes at a time.
        operand: dtype of the scores' factors.
    """

    dim: int
    width: int
    chunk: int
    operand: Any


@triton.jit
@no_type_check
def load_vectors(base, first, rows, stride, bound, first_dim, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Load `WIDTH` dimensions of the vectors `first` + `rows` of one head, zeros from `bound` and `DIM` on."""
    dims = first_dim + tl.arange(0, WIDTH)
    mask = (first + rows < bound)[:, None]
    if DIM % WIDTH != 0:
        mask = mask & (dims < DIM)[None, :]
    start = base + tl.cast(first, tl.int64) * stride
    return tl.load(start + rows[:, None] * stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def zero_tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros for a sum; Triton 3.7 takes the fields of a `Cut` as a shape only once they are arguments."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
@no_type_check
def multiply(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply matrices on tensor cores, summed in float32."""
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision=PRECISION)


@triton.jit
@no_type_check
def score(
    a_base,
    a_first,
    a_time,
    a_bound,
    b_base,
    b_first,
    b_time,
    b_bound,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    CUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of `A_ROWS` vectors with `B_ROWS` others; a few dimensions at a time, which is easy on registers."""
    scores = tl.zeros([A_ROWS, B_ROWS], tl.float32)
    m, n = tl.arange(0, A_ROWS), tl.arange(0, B_ROWS)
    for first_dim in range(0, CUT.dim, CUT.chunk):
        a = load_vectors(a_base, a_first, m, a_time, a_bound, first_dim, CUT.dim, CUT.chunk)
        b = load_vectors(b_base, b_first, n, b_time, b_bound, first_dim, CUT.dim, CUT.chunk)
        scores += multiply(a, tl.trans(b), CUT.operand, PRECISION)
    return scores


@triton.jit
@no_type_check
def query_scores(
    q_ptr,
    k_ptr,
    strides,
    log_scale,
    block,
    queries,
    first_column,
    column_bound,
    CUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores to the base 2 of one head's block of queries against `BLOCK_N` columns of its keys."""
    return log_scale * score(
        q_ptr, block * BLOCK_M, strides.q_time, queries, k_ptr, first_column, strides.k_time, column_bound,
        BLOCK_M, BLOCK_N, CUT, PRECISION,
    )  # fmt: skip


@triton.jit
@no_type_check
def head_vectors(vectors, strides, group, batch, head):
    """Pointers to the queries of one head and to the keys that it shares."""
    q_place = batch * strides.q_batch + head * strides.q_head
    k_place = batch * strides.k_batch + head // group * strides.k_head
    return vectors.q_ptr + q_place, vectors.k_ptr + k_place


@triton.jit
@no_type_check
def query_rows(block, queries, keys, BLOCK_M: tl.constexpr):
    """(rows of a block of queries, their positions among the keys, whether they exist)."""
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows, rows + keys - queries, rows < queries


@triton.jit
@no_type_check
def visible_tiles(block, queries, keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(the first tile of keys that a block of queries sees, the one after its last)."""
    first_time = block * BLOCK_M + keys - queries
    last_time = tl.minimum(first_time + BLOCK_M, keys) - 1
    return tl.maximum(first_time - window + 1, 0) // BLOCK_N, last_time // BLOCK_N + 1


@triton.jit
@no_type_check
def see(times, columns, key_mask_ptr, keys, window, EXCLUDE_SELF: tl.constexpr):
    """(on the support, seen at all) of queries at `times` and keys at `columns`; key_mask_ptr is the row's own."""
    distance = times[:, None] - columns[None, :]
    seen = (distance >= 0) & (distance < window)
    if key_mask_ptr is not None:
        seen = seen & (tl.load(key_mask_ptr + columns, mask=columns < keys, other=0) != 0)[None, :]
    if EXCLUDE_SELF:
        return seen & (distance > 0), seen
    return seen, seen


@triton.jit
@no_type_check
def weight_exponents(scores, normaliser, log_mass):
    """The logarithm of w (5); in this order, because C would lose its digits in L + C."""
    return (scores - normaliser) - log_mass


@triton.jit
@no_type_check
def row_vectors(vectors, strides, batch):
    """Pointers to the queries and keys of one row."""
    return vectors.q_ptr + batch * strides.q_batch, vectors.k_ptr + batch * strides.k_batch


@triton.jit
@no_type_check
def distribution(
    row,
    strides,
    log_scale,
    heads,
    group,
    normaliser_ptr,
    log_mass,
    key_mask_ptr,
    times,
    columns,
    block,
    tile,
    queries,
    keys,
    persistent,
    window,
    CUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """p of one tile, 0 off the support; `heads` is 0 where the caller knows that the tile is off the support.

    `row` is what `row_vectors` returns; normaliser_ptr and key_mask_ptr are the row's own.
    """
    p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first_column, bound = persistent + tile * BLOCK_N, persistent + keys
    q_ptr, k_ptr = row
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    # (5), (6): p = Σ_h exp(s_h - L_h - C)
    for head in range(0, heads):
        q_base = q_ptr + tl.cast(head, tl.int64) * strides.q_head
        k_base = k_ptr + tl.cast(head // group, tl.int64) * strides.k_head
        normaliser_base = normaliser_ptr + tl.cast(head, tl.int64) * queries
        normaliser = tl.load(normaliser_base + rows, mask=rows < queries, other=float("inf"))
        scores = score(
            q_base, block * BLOCK_M, strides.q_time, queries, k_base, first_column, strides.k_time, bound,
            BLOCK_M, BLOCK_N, CUT, PRECISION,
        )  # fmt: skip
        p += tl.exp2(weight_exponents(scores * log_scale, normaliser[:, None], log_mass[:, None]))
    support, _ = see(times, columns, key_mask_ptr, keys, window, EXCLUDE_SELF)
    return tl.where(support, p, 0.0)


@triton.jit
@no_type_check
def log(x):
    """The natural logarithm, finite at 0, where it only ever meets a factor of 0."""
    return tl.log(tl.maximum(x, TINY))


@triton.jit
@no_type_check
def relative_difference(p, p_ref):
    """(p - p_ref) / (p + p_ref)."""
    return (p - p_ref) / tl.maximum(p + p_ref, TINY)


@triton.jit
@no_type_check
def divergence_terms(p, p_ref, DIVERGENCE: tl.constexpr):
    """The terms that keys add to the divergence."""
    if DIVERGENCE == "kl":
        return p_ref * (log(p_ref) - tl.log(tl.maximum(p, LEAST_PROBABILITY)))
    if DIVERGENCE == "reverse_kl":
        return p * (log(p) - tl.log(tl.maximum(p_ref, LEAST_PROBABILITY)))
    # (8): (1 + d) log(1 + d) + (1 - d) log(1 - d) = Σ d^2n / (n (2n - 1)). Near 0, where policies in training are, the
    # series keeps the digits that the logarithms lose.
    d = relative_difference(p, p_ref)
    x = d * d
    series = x * (1 + x * (1 / 6 + x * (1 / 15 + x * (1 / 28 + x * (1 / 45 + x * (1 / 66))))))
    exact = (1 + d) * log(1 + d) + (1 - d) * log(1 - d)
    return (p + p_ref) * tl.where(x < 0.0625, series, exact) * 0.25


@triton.jit
@no_type_check
def divergence_slope(p, p_ref, DIVERGENCE: tl.constexpr):
    """G (9): the derivative by p, up to a constant per query. p sums to 1, so constants fall out."""
    if DIVERGENCE == "kl":
        return 1 - tl.where(p >= LEAST_PROBABILITY, p_ref / tl.maximum(p, LEAST_PROBABILITY), 0.0)
    if DIVERGENCE == "reverse_kl":
        return log(p) - tl.log(tl.maximum(p_ref, LEAST_PROBABILITY))
    # ½ log(2 p / (p + p_ref)) = ½ log(1 + d) = atanh(d / (2 + d)): near 0 again by its series, which is 0 at 0.
    d = relative_difference(p, p_ref)
    z = d / (2 + d)
    x = z * z
    series = z * (1 + x * (1 / 3 + x * (1 / 5 + x * (1 / 7 + x * (1 / 9)))))
    return tl.where(tl.abs(d) < 0.25, series, 0.5 * log(2 * p / tl.maximum(p + p_ref, TINY)))
