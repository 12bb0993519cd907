"""Choice of the precision for training on a CPU."""

from typing import Any

import torch

FLOAT32 = (None, 32, "32", "32-true")


def bfloat16_hardware() -> str | None:
    """Return the instructions by which this processor multiplies bfloat16 matrices: "AMX", "AVX-512" or None."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX-512" if torch.cpu._is_avx512_bf16_supported() else None


def gains_bfloat16() -> bool:
    """Return whether `bf16-mixed` trains faster than float32 on this processor (docs/performance.md has figures)."""
    return bfloat16_hardware() == "AMX"


def choose_precision(trainer: Any, module: type) -> str | None:
    """Return the precision for a trainer's settings that leave it open: bfloat16 where the CPU gains; None for float32.

    Modules with `takes_bfloat16` take it on `accelerator=cpu`: pretraining and reinforcement learning. Rollouts, the
    scores that ratios start from and training passes then have the same precision, and a memory's states and sums are
    float32 in all of them.
    """
    open_to_choice = trainer.accelerator == "cpu" and trainer.precision is None and not trainer.plugins
    takes = getattr(module, "takes_bfloat16", False)
    return "bf16-mixed" if open_to_choice and takes and gains_bfloat16() else None


def precision_advice(trainer: Any, chosen: str | None) -> str | None:
    """Return the log line about a run's precision on a CPU, or None where there is no choice to report."""
    if trainer.accelerator not in ("cpu", "auto") or torch.cuda.is_available() or not gains_bfloat16():
        return None
    if chosen is not None:
        return f"precision {chosen}: this CPU has AMX; --trainer.precision 32-true trains in float32"
    if trainer.precision in FLOAT32:
        return "precision 32-true: this CPU has AMX, and --trainer.precision bf16-mixed trains about 1.2 times as fast"
    return None
