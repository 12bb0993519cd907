"""How evenly a layer shares its reading among persistent tokens, memory and window."""

from jaxtyping import Bool, Float
from torch import Tensor

from .mean import RunningMean
from .span import entropy


class AllocationEntropy(RunningMean):
    """Entropy of the shares in nats, averaged over queries: 0 is one kind alone, ln 3 all three alike."""

    def update(self, shares: Float[Tensor, "batch queries kinds"], mask: Bool[Tensor, "batch queries"]) -> None:
        """Add shares, each row summing to 1; `mask` says which queries count."""
        self.add(entropy(shares.double()), mask)
