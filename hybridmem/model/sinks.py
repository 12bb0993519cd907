"""Window attention with sinks: each token sees the last and the first tokens of its document.

Queries are folded into blocks of one window, so that attention costs time · (window + sinks). Tokens that leave the
window are returned one by one, to be written to a memory. Rows are left-aligned: padding only follows a row's tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from .attention import _last
from .functional import block_pairs
from .sequence import NOWHERE, PADDING, TokenSequence


class Places(NamedTuple):
    """Documents of a window's kept tokens, their indices in the document, and the document's length so far."""

    document_ids: Int[Tensor, "batch kept"]  # NOWHERE if a row keeps fewer tokens
    numbers: Int[Tensor, "batch kept"]
    length: Int[Tensor, " batch"]


class Rows:
    """Rows of a call with padding moved after each row's tokens."""

    def __init__(self, sequence: TokenSequence):
        self.document_ids, self.order = sequence.document_ids, None
        if sequence.mask is None:
            return
        self.order = torch.sort(~sequence.mask, dim=1, stable=True).indices
        self.back = self.order.argsort(dim=1)
        if self.document_ids is None:  # padding without document ids
            self.document_ids = torch.where(sequence.mask, 0, PADDING)
        self.document_ids = self.document_ids.gather(1, self.order)

    def align(self, x: Shaped[Tensor, "batch *rest"], dim: int = 1) -> Shaped[Tensor, "batch *rest"]:
        """Move each row's padding after its tokens along the time axis."""
        return x if self.order is None else _gather(x, self.order, dim)

    def restore(self, x: Shaped[Tensor, "batch time *rest"]) -> Shaped[Tensor, "batch time *rest"]:
        """Undo `align`."""
        return x if self.order is None else _gather(x, self.back, 1)


class WindowPlan:
    """Plan of one call: the keys its queries meet and the keys the next call needs, for rows of one document.

    Buffers hold [tokens kept by earlier calls, the call's tokens] along their third axis.

    Args:
        window: number of tokens that a token sees, itself included.
        sinks: number of first tokens of the document that every later token sees.
        time: number of tokens in the call.
        past: number of tokens that earlier calls read.
        device: device of the masks.
    """

    places: Places | None = None
    document_ids: Int[Tensor, "batch time"] | None = None

    def __init__(self, window: int, sinks: int, time: int, past: int, device: torch.device):
        self.window, self.num_sinks, self.time, self.past, self.device = window, sinks, time, past, device
        self.kept, self.kept_sinks = min(window, past), min(sinks, past)
        self.folded = time > window
        self.blocks, self.block = (-(-time // window), window) if self.folded else (1, time)
        # Without folding, the oldest kept token has just left the window.
        self.dropped = 0 if self.folded else max(0, self.kept - window + 1)
        self.seen_sinks = min(sinks, max(0, past + time - window))
        # Earlier steps write nothing: at most sinks have left the window.
        self.first_write = min(time, max(0, window + sinks - past))
        self.masks: dict[str, Any] = {}  # by attention implementation
        self._mask: Tensor | None = None

    @property
    def written(self) -> Bool[Tensor, "batch steps"] | None:
        """Mark the steps from `first_write` on that write a token to the memory; None: all of them."""
        return None

    def fold_queries(self, q: Shaped[Tensor, "batch heads time dim"]) -> Shaped[Tensor, "folded heads queries dim"]:
        """Fold queries into blocks along the batch axis."""
        if not self.folded:
            return q
        q = F.pad(q, (0, 0, 0, self.blocks * self.window - self.time))
        return q.unflatten(2, (self.blocks, self.window)).transpose(1, 2).flatten(0, 1)

    def unfold(self, out: Shaped[Tensor, "folded queries *rest"]) -> Shaped[Tensor, "batch time *rest"]:
        """Join the outputs of the blocks."""
        return out.unflatten(0, (-1, self.blocks)).flatten(1, 2)[:, : self.time] if self.folded else out

    def fold_keys(
        self, sinks: Shaped[Tensor, "batch heads kept_sinks dim"], buffer: Shaped[Tensor, "batch heads read dim"]
    ) -> Shaped[Tensor, "folded heads keys dim"]:
        """Return the keys, or the values, that each block attends to: [sinks, window]."""
        window = buffer[:, :, self.dropped :]
        if self.folded:
            nothing = buffer.new_empty(buffer.shape[1], 0, buffer.shape[3])  # sinks differ from row to row
            window = block_pairs(buffer, nothing, self.window, self.kept)
        return torch.cat((self._block_sinks(sinks, buffer), window), dim=2) if self.seen_sinks else window

    @property
    def needs_mask(self) -> bool:
        """Return True unless the queries form a plain causal row or a single last token."""
        return self.folded or bool(self.seen_sinks and self.time > 1) or (self.time > 1 and self.kept > 0)

    def mask(self, batch: int) -> Bool[Tensor, "rows 1 queries keys"]:
        """Mark the keys of each block that a query sees."""
        if self._mask is None:
            self._mask = self._make_mask()
            if self.folded and len(self._mask) != batch * self.blocks:
                self._mask = self._mask.expand(batch, *self._mask.shape).flatten(0, 1)
        return self._mask

    def keep(self, buffer: Shaped[Tensor, "batch heads read *rest"]) -> Shaped[Tensor, "batch heads kept *rest"]:
        """Return the end of a buffer, which the next call needs."""
        return _last(buffer, min(self.window, self.kept + self.time), 2)

    def keep_sinks(
        self, sinks: Shaped[Tensor, "batch heads kept_sinks dim"], buffer: Shaped[Tensor, "batch heads read dim"]
    ) -> Shaped[Tensor, "batch heads sinks dim"]:
        """Return the document's first tokens read so far."""
        missing = min(self.num_sinks - self.kept_sinks, self.time)
        return torch.cat((sinks, buffer[:, :, self.kept : self.kept + missing]), dim=2) if missing > 0 else sinks

    def leaving(self, buffer: Shaped[Tensor, "batch heads read *rest"]) -> Shaped[Tensor, "batch heads steps *rest"]:
        """Return the tokens that leave the window, one for each step from `first_write` on."""
        return buffer.narrow(2, self.kept + self.first_write - self.window, self.time - self.first_write)

    def _block_sinks(self, sinks: Tensor, buffer: Tensor) -> Tensor:
        found = self.keep_sinks(sinks, buffer)[:, :, : self.seen_sinks]
        return found if not self.folded else found.repeat_interleave(self.blocks, dim=0)

    def _make_mask(self) -> Tensor:
        arange = partial(torch.arange, device=self.device)
        first = self.past + arange(self.blocks)[:, None] * self.block  # each block's first token
        query = first + arange(self.block)
        before = self.window if self.folded else self.kept - self.dropped
        key = first - before + arange(before + self.block)
        distance = query[:, :, None] - key[:, None]
        seen = (distance >= 0) & (distance < self.window) & (key[:, None] >= 0)
        sinks = query[:, :, None] - arange(self.seen_sinks) >= self.window
        return torch.cat((sinks, seen), dim=2)[:, None]


class DocumentsPlan(WindowPlan):
    """Plan for rows of several documents, or of different lengths.

    Outside the window of a block's query, only sinks of the block's first document can be visible: any other document
    began within the window.
    """

    def __init__(
        self,
        window: int,
        sinks: int,
        document_ids: Int[Tensor, "batch time"],
        past: int,
        before: Places | None,
        padded: bool,
    ):
        super().__init__(window, sinks, document_ids.shape[1], past, document_ids.device)
        self.document_ids, self.documents, self.padded = document_ids, document_ids, padded
        self.before = self._one_document(len(document_ids)) if before is None else before
        self.seen_sinks = sinks if past + self.time > window else 0
        self.first_write = 0 if past + self.time > window else self.time
        last = F.pad(self.before.document_ids, (1, 0), value=NOWHERE)[:, -1:]
        starts = torch.cat((last, document_ids[:, :-1]), dim=1) != document_ids
        self.clock = torch.arange(self.time, device=self.device)
        begin = torch.where(starts, self.clock, -1).cummax(dim=1).values
        # The begin of each token's document relative to the call's first token; negative for a continued document.
        self.begin = torch.where(begin >= 0, begin, -self.before.length[:, None])
        self.index = self.clock - self.begin
        self.all_documents = torch.cat((self.before.document_ids, document_ids), dim=1)
        self.all_indices = torch.cat((self.before.numbers, self.index), dim=1)
        self.count = (document_ids >= 0).sum(1) if padded else torch.full_like(self.before.length, self.time)
        self.places = self._next_places()
        self._written: Tensor | None = None

    @property
    def written(self) -> Bool[Tensor, "batch steps"] | None:
        """Mark the steps at which a token of the same document, other than a sink, leaves the window."""
        if self._written is None:
            front = self.window - self.kept
            documents = F.pad(self.all_documents, (front, 0), value=NOWHERE)[:, : self.time]
            index = F.pad(self.all_indices, (front, 0))[:, : self.time]
            same = (documents == self.documents) & (self.documents >= 0)
            self._written = (same & (index >= self.num_sinks))[:, self.first_write :]
        return self._written

    @property
    def needs_mask(self) -> bool:
        """Return True: a compiled graph cannot inspect documents, so a mask is always needed."""
        return True

    def keep(self, buffer: Shaped[Tensor, "batch heads read *rest"]) -> Shaped[Tensor, "batch heads kept *rest"]:
        """Return the end of each row's tokens."""
        if not self.padded:
            return super().keep(buffer)
        return _gather(buffer, self._kept_columns.clamp(min=0), 2)

    def keep_sinks(
        self, sinks: Shaped[Tensor, "batch heads kept_sinks dim"], buffer: Shaped[Tensor, "batch heads read dim"]
    ) -> Shaped[Tensor, "batch heads sinks dim"]:
        """Return the first tokens of the document that each row is in."""
        last = (self.count - 1).clamp(min=0)[:, None]
        begin = self.begin.gather(1, last)
        begin = torch.where(self.count[:, None] > 0, begin, -self.before.length[:, None])
        columns = self._sink_columns(begin, min(self.num_sinks, self.past + self.time))
        return _gather(torch.cat((sinks, buffer), dim=2), columns, 2)

    def leaving(self, buffer: Shaped[Tensor, "batch heads read *rest"]) -> Shaped[Tensor, "batch heads steps *rest"]:
        """Return the tokens one window back from each step, including tokens that are not written."""
        missing = self.window - self.kept if self.first_write < self.time else 0
        rest = (0, 0) * (buffer.dim() - 3)
        return F.pad(buffer, (*rest, missing, 0))[:, :, : self.time - self.first_write]

    def _block_sinks(self, sinks: Tensor, buffer: Tensor) -> Tensor:
        firsts = self.begin[:, :: self.block][:, : self.blocks]
        columns = self._sink_columns(firsts[..., None], self.seen_sinks).flatten(1)
        found = _gather(torch.cat((sinks, buffer), dim=2), columns, 2)
        return found.unflatten(2, (self.blocks, self.seen_sinks)).transpose(1, 2).flatten(0, 1)

    def _sink_columns(self, begin: Tensor, count: int) -> Tensor:
        """Locate, in [sinks, buffer], the first `count` tokens of documents that began at `begin`."""
        number = torch.arange(count, device=self.device)
        place = begin + number
        columns = torch.where(place >= 0, self.kept_sinks + self.kept + place, number)
        return columns.clamp(max=self.kept_sinks + self.kept + self.time - 1)

    @property
    def _kept_columns(self) -> Tensor:
        kept = min(self.window, self.kept + self.time)
        return self.kept + self.count[:, None] - kept + torch.arange(kept, device=self.device)

    def _next_places(self) -> Places:
        columns = self._kept_columns
        documents, index = (x.gather(1, columns.clamp(min=0)) for x in (self.all_documents, self.all_indices))
        documents = documents.where(columns >= 0, NOWHERE)
        last = (self.count - 1).clamp(min=0)[:, None]
        length = torch.where(self.count > 0, self.index.gather(1, last)[:, 0] + 1, self.before.length)
        return Places(documents, index, length)

    def _one_document(self, batch: int) -> Places:
        """Return the places of tokens that earlier calls read as one document."""
        index = torch.arange(self.past - self.kept, self.past, device=self.device).expand(batch, -1)
        return Places(torch.zeros_like(index), index, torch.full((batch,), self.past, device=self.device))

    def _make_mask(self) -> Tensor:
        positional = super()._make_mask()[:, :, :, self.seen_sinks :]
        keys, queries, index = self.all_documents[:, self.dropped :], self.documents, self.index
        firsts = queries[:, :: self.block][:, : self.blocks]
        if self.folded:
            front, back = self.window - self.kept, self.blocks * self.window - self.time
            keys = F.pad(self.all_documents, (front, back), value=NOWHERE)
            keys = keys.unfold(1, 2 * self.window, self.window).flatten(0, 1)
            queries = F.pad(queries, (0, back), value=NOWHERE).unflatten(1, (self.blocks, -1)).flatten(0, 1)
            index = F.pad(index, (0, back)).unflatten(1, (self.blocks, -1)).flatten(0, 1)
            positional = positional.repeat(len(self.documents), 1, 1, 1)
        seen = positional & (queries[:, None, :, None] == keys[:, None, None])
        left = index[:, :, None] - torch.arange(self.seen_sinks, device=self.device) >= self.window
        sinks = left & (queries == firsts.flatten()[:, None])[:, :, None]
        return torch.cat((sinks[:, None], seen), dim=3)


def plan_window(
    sequence: TokenSequence, rows: Rows, time: int, window: int, sinks: int, before: Places | None, device: torch.device
) -> WindowPlan:
    """Return the plan of a call, made once for all layers with the same window."""
    memo = ("window", window, sinks)
    if memo not in sequence.memo:
        if rows.document_ids is None and before is None:
            plan = WindowPlan(window, sinks, time, sequence.past, device)
        else:
            documents = rows.document_ids
            assert documents is not None  # once a call has documents, all later calls have them
            plan = DocumentsPlan(window, sinks, documents, sequence.past, before, rows.order is not None)
        sequence.memo[memo] = plan
    plan = sequence.memo[memo]
    assert isinstance(plan, WindowPlan)
    return plan


def _gather(x: Tensor, columns: Int[Tensor, "batch wanted"], dim: int) -> Tensor:
    """Gather columns of `x` along `dim`, with separate indices for every row."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = columns.shape
    wanted = list(x.shape)
    wanted[dim] = columns.shape[1]
    return x.gather(dim, columns.view(shape).expand(wanted))
