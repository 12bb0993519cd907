"""Sums that keep float64's digits, whatever the precision of the module that holds the metric."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric


class Float64Metric(Metric):
    """A metric whose states change their device with a module's, and never their dtype.

    torchmetrics guards states against `module.bfloat16()`, but not against `module.to(torch.bfloat16)`, which is how
    Lightning's bf16-true converts a module: sums of 8 bits end at a few hundred.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        return super()._apply(lambda x: x.to(fn(x).device), exclude_state)
