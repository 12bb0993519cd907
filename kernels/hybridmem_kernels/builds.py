"""Descriptions of Triton kernels for ahead-of-time builds, which need no GPU."""

from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # supported by the kernels


@dataclass(frozen=True)
class Build:
    """One kernel at one set of shapes and dtypes.

    Args:
        name: kernel and shapes, as the row's label in the resource report.
        kernel: the function under `triton.jit`.
        signature: Triton's type by argument name: `*fp32`, `*bf16`, `i32`, `fp32`, a named tuple of types, or
            `constexpr`.
        constexprs: values of the `constexpr` arguments by name.
        num_warps, num_stages: launch options.
        has_dots: True if the kernel multiplies matrices, which must use tensor cores.
        maxnreg: limit on registers per thread, a launch option; None: no limit.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    has_dots: bool = True
    maxnreg: int | None = None
