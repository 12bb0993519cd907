"""Random float64 inputs for the scans, with gradients."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridmem_kernels import MemoryState


@dataclass
class ScanInputs:
    tensors: dict[str, Tensor]
    state: MemoryState | None = None
    document_ids: Tensor | None = None
    mask: Tensor | None = None

    def arguments(self) -> dict:
        return dict(self.tensors, state=self.state, document_ids=self.document_ids, mask=self.mask)

    def leaves(self) -> list[Tensor]:
        return [*self.tensors.values(), *(self.state or ())]

    def leaf_names(self) -> list[str]:
        return [*self.tensors, *(self.state._fields if self.state else ())]

    def valid(self) -> Tensor:
        """Return a mask (batch, 1, time, 1) of the tokens without padding."""
        q = self.tensors["q"]
        mask = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if self.mask is None else self.mask
        return mask[:, None, :, None]

    def slice(self, start: int, stop: int) -> "ScanInputs":
        cut = {name: x[:, :, start:stop] for name, x in self.tensors.items()}
        rows = (None if x is None else x[:, start:stop] for x in (self.document_ids, self.mask))
        return ScanInputs(cut, None, *rows)


def scan_inputs(
    time: int,
    batch: int = 2,
    heads: int = 2,
    key_dim: int = 8,
    value_dim: int = 8,
    documents: int = 1,
    boundaries: tuple[int, ...] = (),
    padded: bool = False,
    given_state: bool = False,
    extreme_gates: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> ScanInputs:
    """Return unit keys and queries, and gates over their full range; documents start at random or at `boundaries`."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=dtype)

    gates = [uniform(batch, heads, time) * top for top in (0.2, 0.8, 0.5)]
    if extreme_gates:
        gates = [torch.where(uniform(batch, heads, time) < 0.3, (gate > gate.mean()).to(dtype), gate) for gate in gates]
        gates[2] = gates[2] * 0.3
    tensors = dict(
        q=F.normalize(normal(batch, heads, time, key_dim), dim=-1),
        k=F.normalize(normal(batch, heads, time, key_dim), dim=-1),
        v=normal(batch, heads, time, value_dim),
        alpha=gates[0],
        eta=gates[1],
        theta=gates[2],
    )
    state = None
    if given_state:
        state = MemoryState(*(normal(batch, heads, key_dim, value_dim).requires_grad_() for _ in range(2)))
    document_ids = mask = None
    if documents > 1 or boundaries:
        starts = torch.zeros(batch, time, dtype=torch.long)
        for row in range(batch):
            places = boundaries or torch.randperm(time - 1, generator=g)[: documents - 1] + 1
            starts[row, list(places)] = 1
        document_ids = starts.cumsum(1) + 7
    if padded:
        mask = uniform(batch, time) < 0.7
        mask[0, : time // 4] = False  # left padding
        mask[1, -time // 4 :] = False  # right padding
    return ScanInputs({name: x.requires_grad_() for name, x in tensors.items()}, state, document_ids, mask)
