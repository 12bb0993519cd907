"""Building blocks of the kernels: the arguments of a policy, and one tile of queries against keys.

Query i has the position i + keys - queries; key j is column `persistent` + j of k. Logarithms of sums are to base 2,
like the hardware's exponential; entropies and divergences are in nats. Equation numbers refer to README.md.
"""

from typing import Any, NamedTuple, no_type_check

import triton
import triton.language as tl

from .reference import FLOOR

LEAST_PROBABILITY = tl.constexpr(FLOOR)
TINY = tl.constexpr(1.1754943508222875e-38)  # float32's smallest normal number
LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's lowest number


class Vectors(NamedTuple):
    """Pointers to the queries and keys of one policy."""

    q_ptr: Any
    k_ptr: Any


class Strides(NamedTuple):
    """Strides of the queries and keys of one policy.

    Triton ignores do_not_specialize for fields of tuples. Lengths and windows must not trigger new compilations, so
    they are separate arguments.
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
        dim: dimension of a head.
        width: `dim`, padded to a power of two.
        chunk: dimensions per partial product of scores.
        operand: dtype in which scores are multiplied.
    """

    dim: int
    width: int
    chunk: int
    operand: Any


@triton.jit
@no_type_check
def load_vectors(base, first, rows, stride, bound, first_dim, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Load `WIDTH` dimensions of the vectors `first` + `rows` of one head, with zeros from `bound` and `DIM` on."""
    dims = first_dim + tl.arange(0, WIDTH)
    mask = (first + rows < bound)[:, None]
    if DIM % WIDTH != 0:
        mask = mask & (dims < DIM)[None, :]
    start = base + tl.cast(first, tl.int64) * stride
    return tl.load(start + rows[:, None] * stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def zero_tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a tile of zeros; Triton 3.7 accepts fields of a `Cut` as shapes only if they are passed as arguments."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
@no_type_check
def multiply(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply matrices on tensor cores with float32 sums."""
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
    """Multiply `A_ROWS` vectors by `B_ROWS` others, a few dimensions at a time to save registers."""
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
    """Compute scores to base 2 of one head's block of queries against `BLOCK_N` columns of its keys."""
    return log_scale * score(
        q_ptr,
        block * BLOCK_M,
        strides.q_time,
        queries,
        k_ptr,
        first_column,
        strides.k_time,
        column_bound,
        BLOCK_M,
        BLOCK_N,
        CUT,
        PRECISION,
    )


@triton.jit
@no_type_check
def head_vectors(vectors, strides, group, batch, head):
    """Return pointers to the queries of one head and to its keys."""
    q_place = batch * strides.q_batch + head * strides.q_head
    k_place = batch * strides.k_batch + head // group * strides.k_head
    return vectors.q_ptr + q_place, vectors.k_ptr + k_place


@triton.jit
@no_type_check
def query_rows(block, queries, keys, BLOCK_M: tl.constexpr):
    """Return the rows of a block of queries, their positions among the keys, and a mask of existing rows."""
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows, rows + keys - queries, rows < queries


@triton.jit
@no_type_check
def visible_tiles(block, queries, keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the range of key tiles that a block of queries sees: the first tile, and the index after the last."""
    first_time = block * BLOCK_M + keys - queries
    last_time = tl.minimum(first_time + BLOCK_M, keys) - 1
    return tl.maximum(first_time - window + 1, 0) // BLOCK_N, last_time // BLOCK_N + 1


@triton.jit
@no_type_check
def see(times, columns, key_mask_ptr, keys, window, EXCLUDE_SELF: tl.constexpr):
    """Return masks (on the support, visible) of queries at `times` and keys at `columns`; key_mask_ptr is per row."""
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
    """Compute the logarithm of w (5), in an order that avoids the loss of C's precision in L + C."""
    return (scores - normaliser) - log_mass


@triton.jit
@no_type_check
def row_vectors(vectors, strides, batch):
    """Return pointers to the queries and keys of one row."""
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
    """Compute p of one tile, 0 outside the support; pass heads=0 for tiles known to be outside the support.

    `row` is the result of `row_vectors`; normaliser_ptr and key_mask_ptr are per row.
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
            q_base,
            block * BLOCK_M,
            strides.q_time,
            queries,
            k_base,
            first_column,
            strides.k_time,
            bound,
            BLOCK_M,
            BLOCK_N,
            CUT,
            PRECISION,
        )
        p += tl.exp2(weight_exponents(scores * log_scale, normaliser[:, None], log_mass[:, None]))
    support, _ = see(times, columns, key_mask_ptr, keys, window, EXCLUDE_SELF)
    return tl.where(support, p, 0.0)


@triton.jit
@no_type_check
def log(x):
    """Compute the natural logarithm with a finite value at 0, where it is always multiplied by 0."""
    return tl.log(tl.maximum(x, TINY))


@triton.jit
@no_type_check
def relative_difference(p, p_ref):
    """Compute (p - p_ref) / (p + p_ref)."""
    return (p - p_ref) / tl.maximum(p + p_ref, TINY)


@triton.jit
@no_type_check
def divergence_terms(p, p_ref, DIVERGENCE: tl.constexpr):
    """Compute each key's term of the divergence."""
    if DIVERGENCE == "kl":
        return p_ref * (log(p_ref) - tl.log(tl.maximum(p, LEAST_PROBABILITY)))
    if DIVERGENCE == "reverse_kl":
        return p * (log(p) - tl.log(tl.maximum(p_ref, LEAST_PROBABILITY)))
    # (8): (1 + d) log(1 + d) + (1 - d) log(1 - d) = Σ d^2n / (n (2n - 1)). Near 0, the usual case in training, the
    # series retains the precision that logarithms lose.
    d = relative_difference(p, p_ref)
    x = d * d
    series = x * (1 + x * (1 / 6 + x * (1 / 15 + x * (1 / 28 + x * (1 / 45 + x * (1 / 66))))))
    exact = (1 + d) * log(1 + d) + (1 - d) * log(1 - d)
    return (p + p_ref) * tl.where(x < 0.0625, series, exact) * 0.25


@triton.jit
@no_type_check
def divergence_slope(p, p_ref, DIVERGENCE: tl.constexpr):
    """Compute G (9), the derivative with respect to p up to a constant per query, which cancels as p sums to 1."""
    if DIVERGENCE == "kl":
        return 1 - tl.where(p >= LEAST_PROBABILITY, p_ref / tl.maximum(p, LEAST_PROBABILITY), 0.0)
    if DIVERGENCE == "reverse_kl":
        return log(p) - tl.log(tl.maximum(p_ref, LEAST_PROBABILITY))
    # ½ log(2 p / (p + p_ref)) = ½ log(1 + d) = atanh(d / (2 + d)). Near 0, the series is used, which is 0 at 0.
    d = relative_difference(p, p_ref)
    z = d / (2 + d)
    x = z * z
    series = z * (1 + x * (1 / 3 + x * (1 / 5 + x * (1 / 7 + x * (1 / 9)))))
    return tl.where(tl.abs(d) < 0.25, series, 0.5 * log(2 * p / tl.maximum(p + p_ref, TINY)))
