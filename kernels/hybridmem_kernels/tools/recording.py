"""Recorder of an operator's kernel launches from shapes alone, without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Launch:
    """One kernel launch; `bytes` counts each tensor argument once, whether it is read or written."""

    kernel: str
    programs: int
    bytes: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches inside the context, where operators must be called with tensors on the device "meta"."""
    launches: list[Launch] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        given = (*arguments, *named.values())
        fields = (x for values in given if isinstance(values, tuple) for x in values)
        tensors = {id(x): x for x in (*given, *fields) if isinstance(x, Tensor)}
        size = sum(x.numel() * x.element_size() for x in tensors.values())
        programs = 1
        for extent in grid:
            programs *= extent
        launches.append(Launch(kernel.fn.__name__, programs, size))

    with patch.object(JITFunction, "run", run):
        yield launches
