"""What the kernels do to one tile: a block of queries against a tile of keys.

Query i stands at time i + keys - queries; key j is column `persistent` + j of k. Logarithms of sums are to the base 2,
because the hardware's exponential is; entropies and divergences are natural.
"""

from typing import no_type_check

import triton
import triton.language as tl

from .reference import FLOOR

LEAST_PROBABILITY = tl.constexpr(FLOOR)
TINY = tl.constexpr(1.1754943508222875e-38)  # float32's smallest normal number
LOWEST = tl.constexpr(-3.4028234663852886e38)  # and its lowest


@triton.jit
@no_type_check
def load_vectors(base, first, rows, stride, bound, first_dim, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """`WIDTH` dimensions of the vectors `first` + `rows` of one head, zeros from `bound` and `DIM` on."""
    dims = first_dim + tl.arange(0, WIDTH)
    mask = (first + rows < bound)[:, None]
    if DIM % WIDTH != 0:
        mask = mask & (dims < DIM)[None, :]
    start = base + tl.cast(first, tl.int64) * stride
    return tl.load(start + rows[:, None] * stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def multiply(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """A matrix product on tensor cores, summed in float32."""
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
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of `A_ROWS` vectors with `B_ROWS` others; a few dimensions at a time, which is easy on registers."""
    scores = tl.zeros([A_ROWS, B_ROWS], tl.float32)
    m, n = tl.arange(0, A_ROWS), tl.arange(0, B_ROWS)
    for first_dim in range(0, DIM, CHUNK):
        a = load_vectors(a_base, a_first, m, a_time, a_bound, first_dim, DIM, CHUNK)
        b = load_vectors(b_base, b_first, n, b_time, b_bound, first_dim, DIM, CHUNK)
        scores += multiply(a, tl.trans(b), OPERAND, PRECISION)
    return scores


@triton.jit
@no_type_check
def visible_tiles(block, queries, keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first tile of keys that a block of queries sees, and the one after its last."""
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
    """The logarithm of w; in this order, for L is about as large as the largest score and C drowns in L + C."""
    return (scores - normaliser) - log_mass


@triton.jit
@no_type_check
def mixture(
    q_ptr,
    q_head,
    q_time,
    k_ptr,
    k_head,
    k_time,
    normaliser_ptr,
    log_mass,
    log_scale,
    heads,
    group,
    first_row,
    queries,
    first_column,
    columns,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ_h w_h of one tile, p where it is on the support; `heads` is 0 where the caller knows that none of it is."""
    p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    rows = first_row + tl.arange(0, BLOCK_M)
    for head in range(0, heads):
        q_base = q_ptr + tl.cast(head, tl.int64) * q_head
        k_base = k_ptr + tl.cast(head // group, tl.int64) * k_head
        normaliser_base = normaliser_ptr + tl.cast(head, tl.int64) * queries
        normaliser = tl.load(normaliser_base + rows, mask=rows < queries, other=float("inf"))
        scores = score(
            q_base, first_row, q_time, queries, k_base, first_column, k_time, columns,
            BLOCK_M, BLOCK_N, DIM, BLOCK_DIM, CHUNK, OPERAND, PRECISION,
        )  # fmt: skip
        p += tl.exp2(weight_exponents(scores * log_scale, normaliser[:, None], log_mass[:, None]))
    return p


@triton.jit
@no_type_check
def log(x):
    """The natural logarithm, finite at 0: there it only ever meets a factor of 0."""
    return tl.log(tl.maximum(x, TINY))


@triton.jit
@no_type_check
def relative_difference(p, p_ref):
    """(p - p_ref) / (p + p_ref)."""
    return (p - p_ref) / tl.maximum(p + p_ref, TINY)


@triton.jit
@no_type_check
def divergence_terms(p, p_ref, DIVERGENCE: tl.constexpr):
    """What each key adds to the divergence."""
    if DIVERGENCE == "kl":
        return p_ref * (log(p_ref) - tl.log(tl.maximum(p, LEAST_PROBABILITY)))
    if DIVERGENCE == "reverse_kl":
        return p * (log(p) - tl.log(tl.maximum(p_ref, LEAST_PROBABILITY)))
    # (1 + d) log(1 + d) + (1 - d) log(1 - d) = Σ d^2n / (n (2n - 1)): near 0, where policies in training are, the
    # series keeps the digits that the logarithms lose.
    d = relative_difference(p, p_ref)
    x = d * d
    series = x * (1 + x * (1 / 6 + x * (1 / 15 + x * (1 / 28 + x * (1 / 45 + x * (1 / 66))))))
    exact = (1 + d) * log(1 + d) + (1 - d) * log(1 - d)
    return (p + p_ref) * tl.where(x < 0.0625, series, exact) * 0.25


@triton.jit
@no_type_check
def divergence_slope(p, p_ref, DIVERGENCE: tl.constexpr):
    """The derivative by p, up to a constant per query: p sums to 1, so constants fall out."""
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
