"""Tile sizes and compile-time constants of the Triton kernels, for launches and ahead-of-time builds."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .triton_tiles import Cut

OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tiles(NamedTuple):
    """Tile sizes, shared by all kernels of a plan because the backward locates v by tile."""

    rows: int  # queries
    columns: int  # keys
    chunk: int  # dimensions per partial product of scores
    num_warps: int
    num_stages: int


# By the head's padded width: the largest sizes with which no kernel spills registers on any target. float32 needs small
# tiles because each product consists of three tf32 products whose operands are split in registers; float16 needs them
# because its gradients are tf32 products.
CUDA_TILES = {
    torch.bfloat16: dict.fromkeys((16, 32, 64), Tiles(64, 32, 64, 4, 1))
    | {128: Tiles(64, 64, 64, 8, 1), 256: Tiles(32, 64, 128, 8, 1)},
    torch.float16: dict.fromkeys((16, 32, 64), Tiles(64, 32, 64, 8, 1))
    | {128: Tiles(64, 32, 32, 8, 1), 256: Tiles(32, 64, 64, 8, 1)},
    torch.float32: dict.fromkeys((16, 64), Tiles(64, 32, 32, 8, 1))
    | {32: Tiles(32, 32, 16, 8, 1)}
    | dict.fromkeys((128, 256), Tiles(32, 32, 32, 8, 1)),
}
HIP_TILES = dict.fromkeys((16, 32, 64, 128, 256), Tiles(64, 32, 64, 4, 1))


@dataclass(frozen=True)
class Plan:
    """Plan for comparing two policies; the dtypes are the ones in which scores are multiplied."""

    dim: int
    dim_ref: int
    dtype: torch.dtype
    dtype_ref: torch.dtype
    exclude_self: bool
    divergence: str
    hip: bool
    interpreted: bool = False

    @property
    def tiles(self) -> Tiles:
        """Return tile sizes for the wider head and the wider dtype."""
        dtype = max(self.dtype, self.dtype_ref, key=list(CUDA_TILES).index)
        width = max(_padded(self.dim), _padded(self.dim_ref))
        return HIP_TILES[width] if self.hip else CUDA_TILES[dtype][width]

    @property
    def options(self) -> dict[str, int]:
        """Return the launch options of all kernels."""
        return dict(num_warps=self.tiles.num_warps, num_stages=self.tiles.num_stages)

    @property
    def shared(self) -> dict[str, Any]:
        """Return the constants of all kernels."""
        return dict(
            BLOCK_M=self.tiles.rows,
            BLOCK_N=self.tiles.columns,
            EXCLUDE_SELF=int(self.exclude_self),
            PRECISION=self._precision("tf32x3"),
        )

    @property
    def log_sums(self) -> dict[str, Any]:
        """Return the constants of pass 1 for p."""
        return dict(self.shared, CUT=self._cut(self.dim, self.dtype))

    @property
    def log_sums_ref(self) -> dict[str, Any]:
        """Return the constants of pass 1 for p_ref."""
        return dict(self.shared, CUT=self._cut(self.dim_ref, self.dtype_ref))

    @property
    def compare(self) -> dict[str, Any]:
        """Return the constants of kernels that compare both policies: pass 2, and the pass that stores v."""
        return dict(self.log_sums, CUT_REF=self.log_sums_ref["CUT"], DIVERGENCE=self.divergence)

    @property
    def gradient(self) -> dict[str, Any]:
        """Return the constants of dq and dk; in float16 they use tf32, as gradients of long means would underflow."""
        half = self.dtype == torch.float16
        operand = tl.float32 if half else self._operand(self.dtype)
        return self.log_sums | dict(GRAD_OPERAND=operand, PRECISION=self._precision("tf32" if half else "tf32x3"))

    def _cut(self, dim: int, dtype: torch.dtype) -> Cut:
        width = _padded(dim)
        return Cut(dim, width, min(self.tiles.chunk, width), self._operand(dtype))

    def _operand(self, dtype: torch.dtype) -> Any:
        """Return the dtype of factors; the interpreter's products are correct only in float32."""
        return tl.float32 if self.interpreted else OPERANDS[dtype]

    def _precision(self, on_cuda: str) -> str:
        """Return the precision of float32 products; AMD's matrix cores support float32 directly."""
        return "ieee" if self.hip or self.interpreted else on_cuda


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))
