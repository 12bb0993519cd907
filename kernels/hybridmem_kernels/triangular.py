"""The inverse of I + N for many small strictly lower triangular N at once."""

import torch
from jaxtyping import Float
from torch import Tensor

BASE = 8  # blocks of this size are inverted by substitution, larger ones from their halves


def unit_lower_inverse(strict: Float[Tensor, "matrices size size"]) -> Float[Tensor, "matrices size size"]:
    """Invert I + N, N = `strict` being zero on and above its diagonal.

    Blocked: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]. It is as stable as substitution (a Neumann
    product is not: powers of N overflow long before the inverse does) and is made of batched products.
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
    """A view of the blocks along the diagonal, matrices last: substitution then runs over long rows."""
    blocks = matrices.unflatten(2, (-1, base)).unflatten(1, (-1, base))
    return blocks.diagonal(dim1=1, dim2=3).permute(1, 2, 3, 0)


def _substitution(
    strict: Float[Tensor, "base base blocks matrices"],
) -> Float[Tensor, "base base blocks matrices"]:
    """Forward substitution of the unit vectors, row by row."""
    strict = strict.contiguous()
    inverse = torch.zeros_like(strict)
    for i in range(strict.shape[0]):
        inverse[i, i] = 1
        for j in range(i):
            inverse[i, : j + 1].addcmul_(strict[i, j], inverse[j, : j + 1], value=-1)
    return inverse
