"""Descriptions of Triton kernels, from which they are built ahead of time for a GPU that need not be there."""

from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # that the kernels take


@dataclass(frozen=True)
class Build:
    """One kernel at one set of shapes and dtypes.

    Args:
        name: kernel and shapes in words, the row's name in the resource report.
        kernel: the function under `triton.jit`.
        signature: argument name: Triton's type (`*fp32`, `*bf16`, `i32`, `fp32`), a named tuple of types, or
            `constexpr`.
        constexprs: argument name: value, of those.
        num_warps, num_stages: as it is launched.
        has_dots: whether it multiplies matrices, which must then be on tensor cores.
        maxnreg: registers that a thread may have, as it is launched; None: as many as the compiler likes.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    has_dots: bool = True
    maxnreg: int | None = None
