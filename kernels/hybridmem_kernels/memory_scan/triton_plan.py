"""Tile sizes and precision of the linear memory's kernels, and the description of a launch."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..builds import DTYPES, Build

LEAST_DIM, LARGEST_DIM = 16, 256
LEAST_CHUNK, LARGEST_CHUNK = 16, 128
LARGEST_TILE = 64  # longer chunks are worked on as two: a checkpoint is kept for every other one


def check_supported(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> None:
    """Raise a ValueError where there is no kernel for it."""
    advice = "choose backend='torch'"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise ValueError(f"the triton backend takes float32, bfloat16 and float16, {name} is {x.dtype}: {advice}")
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
        size: tokens that are worked on at once.
        spacing: a state is kept for the backward every `spacing` of these.
        precision: of products, where they are not of two 16-bit inputs; None is tf32 where the target has it.
        exact: of the products that invert.
        width: columns of a tile. A product in tf32x3 is three, whose operands all lie in registers: half as many.
        scan_keys: key dimensions of a tile in the passes through the chunks.
        wide: columns of a tile in the kernels that hold few of them.
        chunk_warps: of the kernel that inverts.
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
        """Constants of the kernels of independent chunks."""
        return self._cut(self.width, self.width)

    @property
    def wide_tile(self) -> dict[str, Any]:
        """Constants of the kernels of independent chunks that hold few tiles."""
        return self._cut(self.wide, self.wide)

    @property
    def scan_tile(self) -> dict[str, Any]:
        """Constants of the kernels that go from chunk to chunk."""
        return self._cut(self.scan_keys, self.width)

    @property
    def key_blocks(self) -> int:
        """Number of programs that share the key dimensions."""
        return triton.cdiv(self.key_dim, self.tile["KEY_BLOCK"])

    def value_blocks(self, tile: dict[str, Any]) -> int:
        """Number of programs that share the columns of values."""
        return triton.cdiv(self.value_dim, tile["VALUE_BLOCK"])


def make_plan(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, hip: bool, interpreted: bool) -> Plan:
    """The plan for these inputs. AMD's matrix cores take float32 as it is; the interpreter knows no other product."""
    chunk = max(LEAST_CHUNK, triton.next_power_of_2(min(chunk_size, q.shape[2])))
    size = min(chunk, LARGEST_TILE)
    exact = "ieee" if hip or interpreted else "tf32x3"
    single = all(x.dtype == torch.float32 for x in (q, k, v))
    precision = exact if single or interpreted else None
    width, scan_keys = (16, 32) if single else (32, size)
    wide, chunk_warps = (width, 4) if single or hip else (64, 2)  # measured on Hopper alone
    if size <= 32:
        chunk_warps = 2
    return Plan(
        q.shape[-1], v.shape[-1], size, chunk // size, precision, exact, width, scan_keys, wide, chunk_warps
    )  # fmt: skip


class Launch(NamedTuple):
    """One kernel with all that it is given.

    Its loads are not pipelined (num_stages is 1): several programs on a multiprocessor hide latency as well, and what
    is loaded ahead takes the registers that these need.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors and integers
    constexprs: dict[str, Any]
    num_warps: int = 4
    has_dots: bool = True

    def run(self) -> None:
        """Run it on the tensors' device."""
        self.kernel[self.grid](**self.arguments, **self.constexprs, num_warps=self.num_warps, num_stages=1)

    def build(self, shapes: str) -> Build:
        """Return the description of its ahead-of-time build."""
        types = {n: f"*{DTYPES[x.dtype]}" if isinstance(x, Tensor) else "i32" for n, x in self.arguments.items()}
        signature = {name: types.get(name, "constexpr") for name in self.kernel.arg_names}
        name = f"{self.kernel.__name__} {shapes}"
        return Build(name, self.kernel, signature, self.constexprs, self.num_warps, 1, self.has_dots)
