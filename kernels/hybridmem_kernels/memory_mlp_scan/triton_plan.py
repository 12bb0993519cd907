"""Sizes, tiles and warps of the deep memory's kernels, and their ahead-of-time builds."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..builds import DTYPES, Build
from .triton_forward import read_kernel, scan_kernel
from .triton_read_backward import read_backward_kernel, surprise_kernel
from .triton_scan_backward import scan_backward_kernel
from .triton_tiles import Cut
from .triton_tokens import decays_backward_kernel, decays_kernel, gather_kernel, scatter_kernel

MOST_HIDDEN = 1024
TILE = 32  # widths are padded to whole tiles of this many columns
WIDE_TILE = 64  # columns of a tile if all widths are multiples and registers suffice: fewer and faster products
READ_ROWS = 32  # tokens per program of read_kernel
ROW_BY_ROW = (decays_kernel, decays_backward_kernel)
WITH_DOTS = (scan_kernel, read_kernel, surprise_kernel, read_backward_kernel, scan_backward_kernel)
TOKEN_POINTERS = ("q_ptr", "k_ptr", "v_ptr", "grad_out_ptr", "out_ptr", "grad_q_ptr", "grad_k_ptr", "grad_v_ptr")
GATE_POINTERS = ("alpha_ptr", "eta_ptr", "theta_ptr", "grad_alpha_ptr", "grad_eta_ptr", "grad_theta_ptr")
OTHER_POINTERS = {
    "times_ptr": "*i64",
    "end_anchor_ptr": "*i64",
    "valid_ptr": "*i1",
    "begins_ptr": "*i1",
    "new_document_ptr": "*i1",
}


class Shape(NamedTuple):
    """Sizes that are kernel arguments, so that one kernel serves all depths and widths.

    Args:
        dim: columns of a token.
        depth: number of layers.
        width, hidden: columns of the outer and the hidden layers, padded to whole tiles.
        used: slots of a chunk that can hold tokens.
    """

    dim: int
    depth: int
    width: int
    hidden: int
    used: int

    @property
    def slots(self) -> int:
        """Return the padded number of slots of a chunk."""
        return max(32, triton.next_power_of_2(self.used))

    @property
    def is_wide(self) -> bool:
        """Return True if all widths are multiples of wide tiles."""
        return self.width % WIDE_TILE == 0 and self.hidden % WIDE_TILE == 0

    @property
    def row_size(self) -> int:
        """Return the number of elements in a row of scratch."""
        return (self.depth - 1) * self.hidden + self.width

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """List the rows and columns of every layer's matrix in scratch."""
        return list(pairwise([self.width, *[self.hidden] * (self.depth - 1), self.width]))

    @property
    def state_size(self) -> int:
        """Return the number of elements in the weights of a lane."""
        return sum(rows * columns for rows, columns in self.matrices)


def shape_of(widths: Sequence[int], used: int) -> Shape:
    """Pad widths to whole tiles; `used` slots of a chunk can hold tokens."""
    width, hidden = (triton.cdiv(size, TILE) * TILE for size in (widths[0], max(widths[1:-1])))
    return Shape(widths[0], len(widths) - 1, width, hidden, used)


def check_dtypes(tokens: Sequence[Tensor]) -> None:
    """Raise a ValueError for token dtypes that the kernels do not support."""
    for x in tokens:
        if x.dtype not in DTYPES:
            raise ValueError(
                f"the Triton kernels take float32, bfloat16 and float16, got {x.dtype}; use backend='torch'"
            )


def check_sizes(widths: tuple[int, ...], chunk_size: int) -> None:
    """Raise a ValueError that names the limit if the kernels do not support the chunk size or a width."""
    limits = [("a chunk_size of", chunk_size, 128), ("a dim of", widths[0], 256)]
    limits += [("hidden layers as wide as", width, MOST_HIDDEN) for width in widths[1:-1]]
    for name, size, most in limits:
        if not 16 <= size <= most:
            raise ValueError(f"the Triton kernels take {name} 16 to {most}, got {size}; use backend='torch'")


def constexprs(kernel: Any, shape: Shape, half: bool, backend: str) -> dict[str, Any]:
    """Return the compile-time constants of `kernel`: tiles as large as registers allow.

    `half`: the tokens have 16 bits; backend: "cuda" or "hip".
    """
    if kernel in ROW_BY_ROW:
        return dict(SLOTS=shape.slots)
    rows = READ_ROWS if kernel is read_kernel else min(shape.slots, 64 if half else 32)
    if half and backend == "cuda" and shape.is_wide:
        tile = WIDE_TILE
    else:
        tile = 16 if half and rows == 32 and kernel is scan_backward_kernel else TILE
    return dict(CUT=Cut(rows, tile, _operands(half, backend)))


def _operands(half: bool, backend: str) -> str:
    """Choose the precision of products: TF32 holds 16-bit tokens exactly with float32's range; float32 needs 3xTF32."""
    if half:
        return "tf32"
    return "ieee" if backend == "hip" else "tf32x3"  # CDNA multiplies float32 in full


def options(kernel: Any, shape: Shape, half: bool, backend: str) -> dict[str, int]:
    """Choose warps and stages such that no register spills and no loop prefetches data that it has yet to write."""
    if kernel in ROW_BY_ROW:
        return dict(num_warps=1, num_stages=1)
    if half and backend == "cuda" and shape.is_wide:
        few = kernel in (read_kernel, surprise_kernel) or (kernel is read_backward_kernel and shape.slots == 32)
    else:
        few = not half or (shape.slots == 32 and kernel in (scan_kernel, read_backward_kernel))
    chosen = dict(num_warps=4 if few else 8, num_stages=1)
    if backend == "cuda" and kernel is read_kernel:
        chosen |= dict(maxnreg=224)  # by default the compiler uses fewer registers and spills
    return chosen


def builds(widths: Sequence[int], chunk_size: int, dtype: torch.dtype, backend: str = "cuda") -> list[Build]:
    """List every kernel that a call launches in forward and backward.

    Args:
        widths: widths before and after every layer: (64, 256, 64) is depth 2 with an expansion of 4. Widths and the
            gradient bound are run-time arguments: memories that differ only in them share their kernels.
        chunk_size: as in `memory_mlp_scan`.
        dtype: dtype of q, k and v; the gates are float32.
        backend: "cuda" or "hip".

    Raises:
        ValueError: the kernels do not support the chunk size or a width.
    """
    check_sizes(tuple(widths), chunk_size)
    shape = shape_of(widths, chunk_size)
    absent = dict(grad_out_ptr=None, grad_y_ptr=None)  # arguments that the forward's gather omits
    kernels = (gather_kernel, decays_kernel, *WITH_DOTS, decays_backward_kernel, scatter_kernel)
    return [
        _build(gather_kernel, shape, dtype, backend, absent),
        *(_build(kernel, shape, dtype, backend, {}) for kernel in kernels),
    ]


def _build(kernel: Any, shape: Shape, dtype: torch.dtype, backend: str, absent: dict[str, None]) -> Build:
    half = dtype != torch.float32
    constants = constexprs(kernel, shape, half, backend) | absent
    types = dict.fromkeys(kernel.arg_names, "i32") | dict(max_grad_norm="fp32")
    types |= {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= dict.fromkeys(TOKEN_POINTERS, f"*{DTYPES[dtype]}") | OTHER_POINTERS
    types |= dict.fromkeys(constants, "constexpr")
    cut = f"slots {shape.slots}{' wide' if shape.is_wide else ''}"
    return Build(
        name=f"{kernel.fn.__name__}{' forward' if absent else ''} {cut} {DTYPES[dtype]}",
        kernel=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=constants,
        **options(kernel, shape, half, backend),
        has_dots=kernel in WITH_DOTS,
    )
