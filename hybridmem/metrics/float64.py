"""Metrics with float64 sums, independent of the precision of the module that holds them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric


class Float64Metric(Metric):
    """Metric whose states follow a module's device but not its dtype.

    torchmetrics protects states from `module.bfloat16()`, but not from `module.to(torch.bfloat16)`, with which
    Lightning's bf16-true converts a module. Sums with 8 bits of precision would stop growing at a few hundred.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        return super()._apply(lambda x: x.to(fn(x).device), exclude_state)
