"""Choice of the backend of an operator."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("torch", "triton", "reference")
VARIABLE = "HYBRIDMEM_BACKEND"
HAS_TRITON = find_spec("triton") is not None

logger = logging.getLogger(__name__)
_forced: str | None = None  # a plain global, guarded by torch.compile, so that compiled graphs follow `use_backend`
_said: set[tuple[str, str]] = set()


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every operator with "torch", "triton" or "reference" inside the context, in all threads.

    Raises:
        ValueError: the backend is unknown.
    """
    global _forced
    _check_name(backend, f"use_backend({backend!r})")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def choose_backend(operator: str, backend: str | None, like: Tensor) -> str:
    """Choose the backend of `operator` for tensors like `like`, and log each choice once.

    The order of precedence is the call's `backend`, `use_backend`, and the environment variable HYBRIDMEM_BACKEND. The
    default is "triton" on a GPU and "torch" elsewhere, also for float64, which Triton does not support on tensor cores.
    A compiled graph keeps the environment variable's value from its compilation.

    Raises:
        ValueError: the backend is unknown, or Triton is requested for tensors that are not on a GPU.
        ImportError: the Triton backend is requested but not installed.
    """
    variable = os.environ.get(VARIABLE)
    choice = backend or _forced or variable
    if not choice:
        fits = like.device.type == "cuda" and like.dtype != torch.float64 and HAS_TRITON
        choice = "triton" if fits else "torch"
    if choice != "torch":
        _check_choice(choice, _reason(backend, variable, like.device.type, like.dtype), like.device.type)
    _say_once(operator, choice, backend, variable, like.device.type, like.dtype)
    return choice


def _reason(backend: str | None, variable: str | None, device: str, dtype: torch.dtype) -> str:
    """Describe the reason for the choice of a backend, or the setting that requested it."""
    if backend:
        return f"backend={backend!r}"
    if _forced:
        return f"use_backend({_forced!r})"
    if variable:
        return f"{VARIABLE}={variable}"
    if device != "cuda":
        return f"the tensors are on {device}"
    if dtype == torch.float64:
        return "the tensors are float64, which the Triton kernels do not support"
    return (
        "the tensors are on a GPU"
        if HAS_TRITON
        else "Triton is not installed; on Linux: pip install 'hybridmem[triton]'"
    )


def _check_name(backend: str, reason: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{reason} does not exist; choose one of {', '.join(BACKENDS)}")


def _check_choice(choice: str, reason: str, device: str) -> None:
    _check_name(choice, reason)
    if choice != "triton":
        return
    if not HAS_TRITON:
        raise ImportError(
            f"{reason} needs Triton, which is not installed: on Linux pip install 'hybridmem[triton]', elsewhere "
            "choose the backend 'torch'"
        )
    if device != "cuda" and not interpreting():
        raise ValueError(
            f"{reason} needs tensors on a GPU, got {device}: move them there, choose the backend 'torch', or "
            "set TRITON_INTERPRET=1 to run the kernels slowly without one"
        )


def interpreting() -> bool:
    """Return True if Triton's kernels run in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@torch.compiler.assume_constant_result  # logged while a graph is compiled, not on every run
def _say_once(
    operator: str, choice: str, backend: str | None, variable: str | None, device: str, dtype: torch.dtype
) -> None:
    if (operator, choice) not in _said:
        _said.add((operator, choice))
        reason = _reason(backend, variable, device, dtype)
        logger.info("%s runs with the backend %r: %s", operator, choice, reason)
