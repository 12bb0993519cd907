"""Records of attention and memory in a forward pass."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hybridmem.model.memory import ScanInputs
from hybridmem_kernels import AttentionStats, attention_divergence


@dataclass
class AttentionRecord:
    """Queries and keys of an attention layer after the rotary embedding, with the description of its mask.

    Keys are ordered [persistent tokens, other tokens]; queries belong to the last tokens.
    """

    q: Float[Tensor, "batch heads queries dim"]
    k: Float[Tensor, "batch kv_heads keys dim"]
    scale: float
    window: int | None = None
    num_persistent: int = 0
    key_mask: Bool[Tensor, "batch tokens"] | None = None  # False for padding

    def map(self, function: Callable[[Tensor], Tensor]) -> "AttentionRecord":
        """Apply a function to the tensors."""
        key_mask = None if self.key_mask is None else function(self.key_mask)
        return replace(self, q=function(self.q), k=function(self.k), key_mask=key_mask)

    @property
    def num_tokens(self) -> int:
        """Return the number of recorded keys without persistent tokens."""
        return self.k.shape[2] - self.num_persistent

    def over_tokens(self, count: int) -> "AttentionRecord":
        """Return the record with keys for the last `count` tokens.

        Keys that a window's cache has dropped are filled with zeros; they lie beyond the window of every query.
        """
        missing = count - self.num_tokens
        if not missing:
            return self
        persistent, others = self.k[:, :, : self.num_persistent], self.k[:, :, self.num_persistent :]
        k = torch.cat((persistent, torch.nn.functional.pad(others, (0, 0, missing, 0))), dim=2)
        key_mask = None if self.key_mask is None else torch.nn.functional.pad(self.key_mask, (missing, 0), value=True)
        return replace(self, k=k, key_mask=key_mask)

    def last_queries(self, length: int, shift: int = 0) -> "AttentionRecord":
        """Return the record with the queries of `length` tokens that end `shift` tokens before the last one."""
        if not shift:
            return replace(self, q=self.q[:, :, -length:])
        key_mask = None if self.key_mask is None else self.key_mask[:, :-shift]
        return replace(self, q=self.q[:, :, -length - shift : -shift], k=self.k[:, :, :-shift], key_mask=key_mask)

    def compare(
        self, reference: "AttentionRecord", query_mask: Bool[Tensor, "batch queries"], divergence: str = "jsd"
    ) -> AttentionStats:
        """Return the divergence of this attention from a reference over the same tokens, per query."""
        longer = max(self, reference, key=lambda side: side.num_tokens)
        k, k_ref = (side.over_tokens(longer.num_tokens).k for side in (self, reference))
        return attention_divergence(
            self.q,
            k,
            reference.q,
            k_ref,
            scale=self.scale,
            scale_ref=reference.scale,
            window=self.window,
            window_ref=reference.window,
            num_persistent=self.num_persistent,
            num_persistent_ref=reference.num_persistent,
            query_mask=query_mask,
            key_mask=longer.key_mask,
            divergence=divergence,
        )


@dataclass
class LayerRecord:
    """Record of one layer; fields that its variant lacks are None or empty."""

    variant: str
    attention: AttentionRecord | None = None
    segments: list[AttentionRecord] = field(default_factory=list)  # mac: keys [persistent, recalled, segment]
    gate: Float[Tensor, "batch time heads"] | None = None  # mag: the share of attention
    memory: ScanInputs | None = None
    memory_depth: int = 1

    def detach(self) -> "LayerRecord":
        """Return the record without its autograd graph."""
        return self._map(Tensor.detach)

    def select(self, rows: Int[Tensor, " rows"]) -> "LayerRecord":
        """Return the record of the selected rows."""
        return self._map(lambda x: x[rows])

    def _map(self, function: Callable[[Tensor], Tensor]) -> "LayerRecord":
        return replace(
            self,
            attention=None if self.attention is None else self.attention.map(function),
            segments=[segment.map(function) for segment in self.segments],
            gate=None if self.gate is None else function(self.gate),
            memory=None if self.memory is None else ScanInputs(*map(function, self.memory)),
        )


class Records(dict[int, LayerRecord]):
    """Layer records of one forward pass, by layer index."""

    def detach(self) -> "Records":
        """Return the records without their autograd graph."""
        return Records({number: record.detach() for number, record in self.items()})

    def select(self, rows: Int[Tensor, " rows"]) -> "Records":
        """Return the records of the selected rows."""
        return Records({number: record.select(rows) for number, record in self.items()})
