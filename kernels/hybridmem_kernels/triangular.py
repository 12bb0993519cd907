"""Batched inverse of I + N for small strictly lower triangular N."""

import torch
from jaxtyping import Float
from torch import Tensor

BASE = 8  # blocks of this size are inverted by substitution, larger ones by merging their halves


def unit_lower_inverse(strict: Float[Tensor, "matrices size size"]) -> Float[Tensor, "matrices size size"]:
    """Invert I + N for N = `strict`, which is zero on and above its diagonal.

    The inverse is blocked: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]. This is as stable as substitution
    and consists of batched products. A Neumann product is unstable: powers of N overflow long before the inverse does.
    """
    size = strict.shape[-1]
    base = BASE if size % BASE == 0 else size
    inverse = torch.zeros_like(strict)
    _diagonal_blocks(inverse, base).copy_(_substitution(_diagonal_blocks(strict, base)))
    width = base
    while width < size:
        for low in range(0, size - width, 2 * width):
            top, bottom = slice(low, low + width), slice(low + width, min(low + 2 * width, size))
            below = torch.bmm(strict[:, bottom, top], inverse[:, top, top])
            inverse[:, bottom, top] = torch.bmm(inverse[:, bottom, bottom], below).neg_()
        width *= 2
    return inverse


def _diagonal_blocks(
    matrices: Float[Tensor, "matrices size size"], base: int
) -> Float[Tensor, "base base blocks matrices"]:
    """Return a view of the diagonal blocks with the matrices as last axis, so that substitution runs over long rows."""
    blocks = matrices.unflatten(2, (-1, base)).unflatten(1, (-1, base))
    return blocks.diagonal(dim1=1, dim2=3).permute(1, 2, 3, 0)


def _substitution(
    strict: Float[Tensor, "base base blocks matrices"],
) -> Float[Tensor, "base base blocks matrices"]:
    """Invert by forward substitution of the unit vectors, row by row."""
    strict = strict.contiguous()
    inverse = torch.zeros_like(strict)
    for i in range(strict.shape[0]):
        inverse[i, i] = 1
        for j in range(i):
            inverse[i, : j + 1].addcmul_(strict[i, j], inverse[j, : j + 1], value=-1)
    return inverse
