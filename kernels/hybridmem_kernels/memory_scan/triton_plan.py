"""Tile sizes and precision of the linear memory's kernels, and descriptions of launches."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..builds import DTYPES, Build

LEAST_DIM, LARGEST_DIM = 16, 256
LEAST_CHUNK, LARGEST_CHUNK = 16, 128
LARGEST_TILE = 64  # longer chunks are processed as two, with a checkpoint for every other one


def check_supported(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> None:
    """Raise a ValueError for dtypes, dimensions or chunk sizes that have no kernel."""
    advice = "choose backend='torch'"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise ValueError(
                f"the triton backend takes float32, bfloat16 and float16, but {name} is {x.dtype}: {advice}"
            )
    for name, dim in (("key_dim", q.shape[-1]), ("value_dim", v.shape[-1])):
        if not LEAST_DIM <= dim <= LARGEST_DIM:
            raise ValueError(f"the triton backend takes {name} from {LEAST_DIM} to {LARGEST_DIM}, got {dim}: {advice}")
    if not LEAST_CHUNK <= chunk_size <= LARGEST_CHUNK:
        limits = f"{LEAST_CHUNK} to {LARGEST_CHUNK}"
        raise ValueError(f"the triton backend takes chunk_size from {limits}, got {chunk_size}: choose one of these")


@dataclass(frozen=True)
class Plan:
    """Tile sizes and precision for one shape.

    Args:
        size: number of tokens processed at once.
        spacing: number of chunks of `size` per state that is kept for the backward.
        precision: precision of products other than those of two 16-bit inputs; None is tf32 where available.
        exact: precision of products in the matrix inverse.
        width: columns of a tile; half as many under tf32x3, which holds the operands of three products in registers.
        scan_keys: key dimensions of a tile in the passes through the chunks.
        wide: columns of a tile in kernels that hold few tiles.
        chunk_warps: number of warps of the kernel that computes the inverse.
    """

    key_dim: int
    value_dim: int
    size: int
    spacing: int
    precision: str | None
    exact: str
    width: int
    scan_keys: int
    wide: int
    chunk_warps: int

    def _cut(self, key_width: int, value_width: int) -> dict[str, Any]:
        key_block = min(key_width, triton.next_power_of_2(self.key_dim))
        value_block = min(value_width, triton.next_power_of_2(self.value_dim))
        dims = dict(KEY_DIM=self.key_dim, VALUE_DIM=self.value_dim, KEY_BLOCK=key_block, VALUE_BLOCK=value_block)
        return dict(dims, SIZE=self.size, PRECISION=self.precision)

    @property
    def tile(self) -> dict[str, Any]:
        """Return the constants of kernels over independent chunks."""
        return self._cut(self.width, self.width)

    @property
    def wide_tile(self) -> dict[str, Any]:
        """Return the constants of kernels over independent chunks that hold few tiles."""
        return self._cut(self.wide, self.wide)

    @property
    def scan_tile(self) -> dict[str, Any]:
        """Return the constants of kernels that pass through the chunks in sequence."""
        return self._cut(self.scan_keys, self.width)

    @property
    def key_blocks(self) -> int:
        """Return the number of programs that share the key dimensions."""
        return triton.cdiv(self.key_dim, self.tile["KEY_BLOCK"])

    def value_blocks(self, tile: dict[str, Any]) -> int:
        """Return the number of programs that share the value columns."""
        return triton.cdiv(self.value_dim, tile["VALUE_BLOCK"])


def make_plan(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, hip: bool, interpreted: bool) -> Plan:
    """Choose tile sizes and precision for the inputs.

    Products are plain float32 on AMD, whose matrix cores support it, and in the interpreter, which has no alternative.
    """
    chunk = max(LEAST_CHUNK, triton.next_power_of_2(min(chunk_size, q.shape[2])))
    size = min(chunk, LARGEST_TILE)
    exact = "ieee" if hip or interpreted else "tf32x3"
    single = all(x.dtype == torch.float32 for x in (q, k, v))
    precision = exact if single or interpreted else None
    width, scan_keys = (16, 32) if single else (32, size)
    wide, chunk_warps = (width, 4) if single or hip else (64, 2)  # tuned on Hopper only
    if size <= 32:
        chunk_warps = 2
    return Plan(q.shape[-1], v.shape[-1], size, chunk // size, precision, exact, width, scan_keys, wide, chunk_warps)


class Launch(NamedTuple):
    """One kernel launch with its grid, arguments and constants.

    Loads are not pipelined (num_stages is 1): several programs per multiprocessor hide latency equally well, and
    prefetched data would take the registers that these programs need.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors and integers
    constexprs: dict[str, Any]
    num_warps: int = 4
    has_dots: bool = True

    def run(self) -> None:
        """Launch the kernel on the tensors' device."""
        self.kernel[self.grid](**self.arguments, **self.constexprs, num_warps=self.num_warps, num_stages=1)

    def build(self, shapes: str) -> Build:
        """Return the description of the kernel's ahead-of-time build."""
        types = {n: f"*{DTYPES[x.dtype]}" if isinstance(x, Tensor) else "i32" for n, x in self.arguments.items()}
        signature = {name: types.get(name, "constexpr") for name in self.kernel.arg_names}
        name = f"{self.kernel.__name__} {shapes}"
        return Build(name, self.kernel, signature, self.constexprs, self.num_warps, 1, self.has_dots)
