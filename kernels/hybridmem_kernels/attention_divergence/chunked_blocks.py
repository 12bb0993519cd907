"""Blocks of queries for the tiled comparison, and the tensors from which a block takes its part."""

from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from math import log
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .reference import AttentionPolicy

# Maximum number of scores per tile, over all rows and heads; the scores of one query are never split.
TILE = 2**24  # large enough for few launches
CPU_TILE = 2**18  # small enough for the cache
LEAST_REACH = 64  # queries that share the keys of a window; in much longer runs, most scores would be hidden
LN_2 = log(2)


def needed_queries(q: Tensor, query_mask: Tensor | None) -> Int[Tensor, " needed"]:
    """Return the queries that some row needs."""
    if query_mask is None:
        return torch.arange(q.shape[2], device=q.device)
    return query_mask.any(0).nonzero().squeeze(1)


def _places(needed: Int[Tensor, " needed"]) -> slice | Int[Tensor, " needed"]:
    """Return consecutive queries as a slice, which avoids a copy; return others unchanged."""
    if len(needed) == 0:
        return needed
    first, last = int(needed[0]), int(needed[-1])
    return slice(first, last + 1) if last - first + 1 == len(needed) else needed


class Side(NamedTuple):
    """One policy in the dtype of sums: keys, and the needed queries, scaled for scores to base 2."""

    queries: Float[Tensor, "batch heads needed dim"]
    keys: Float[Tensor, "batch kv_heads keys dim"]
    persistent: Float[Tensor, "batch kv_heads persistent dim"]
    window: int | None

    @classmethod
    def of(cls, policy: AttentionPolicy, needed: Int[Tensor, " needed"], dtype: torch.dtype) -> "Side":
        """Select and scale the needed queries, and separate persistent keys from the others."""
        queries = policy.q[:, :, _places(needed)].to(dtype) * (policy.scale / LN_2)
        k, front = policy.k.to(dtype).contiguous(), policy.num_persistent
        return cls(queries, k[:, :, front:], k[:, :, :front], policy.window)


class Kept(NamedTuple):
    """Tensors of one policy that the forward saves; a query without support has L = inf and C = 0, so that w = 0."""

    log_normaliser: Float[Tensor, "batch heads needed"]  # L
    log_mass: Float[Tensor, "batch needed"]  # C

    @classmethod
    def empty(cls, side: Side) -> "Kept":
        """Allocate memory for every needed query."""
        normaliser = side.queries.new_empty(side.queries.shape[:3])
        return cls(normaliser, torch.empty_like(normaliser[:, 0]))

    def at(self, rows: slice) -> "Kept":
        """Select the queries of a block."""
        return Kept(self.log_normaliser[:, :, rows], self.log_mass[:, rows])

    @property
    def counts(self) -> Bool[Tensor, "batch needed"]:
        """Mark the queries that have a distribution."""
        return self.log_normaliser[:, 0].isfinite()


class Queries(NamedTuple):
    """Queries that some row needs, and the keys hidden from them."""

    needed: Int[Tensor, " needed"]  # indices
    times: Int[Tensor, " needed"]  # positions among the keys
    counts: Bool[Tensor, "batch needed"] | None  # query_mask at these queries
    key_mask: Bool[Tensor, "batch keys"] | None
    exclude_self: bool
    biases: dict[int | None, "Bias"]  # the latest bias for each window

    @classmethod
    def of(
        cls, q: Tensor, keys: int, query_mask: Tensor | None, key_mask: Tensor | None, exclude_self: bool
    ) -> "Queries":
        """Find the needed queries."""
        needed = needed_queries(q, query_mask)
        counts = None if query_mask is None else query_mask[:, needed]
        return cls(needed, needed + keys - q.shape[2], counts, key_mask, exclude_self, {})

    def own(self, block: "Block") -> slice | Int[Tensor, " block"]:
        """Return the positions of a block's queries among the keys, as a slice if possible to avoid a copy."""
        return slice(block.first, block.last + 1) if block.is_run else self.times[block.rows]

    def bias(
        self, block: "Block", window: int | None, dtype: torch.dtype
    ) -> Float[Tensor, "parts_or_1 rows_or_1 1 run span"]:
        """Return the initial scores of a block: 0 on a query's support, -inf elsewhere."""
        first, last = block.part(0), self.biases.get(window)
        if last is not None and self.key_mask is None and last.first.lies_like(first, window):
            return last.bias
        band = first.band(window)
        distance = self.times[first.rows, None] - torch.arange(band.start, band.stop, device=self.times.device)
        hidden = distance < int(self.exclude_self)
        if window is not None:
            hidden = hidden | (distance >= window)
        hidden = hidden[None, None, None]
        if self.key_mask is not None:
            padding = torch.stack([~self.key_mask[:, part.band(window)] for part in block.each()])
            hidden = hidden | padding[:, :, None, None]
        bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        self.biases[window] = Bias(first, bias)
        return bias


class Block(NamedTuple):
    """Queries that are processed at once: a few runs of equal length, each with its visible keys, or one part.

    A tile of a block has the shape (parts, batch, heads, run, span).
    """

    rows: slice  # range within the needed queries
    first: int  # times of the first and the last query
    last: int
    parts: int = 1

    @property
    def is_run(self) -> bool:
        """Return True if the block's queries are consecutive."""
        return self.last - self.first + 1 == self.rows.stop - self.rows.start

    def part(self, n: int) -> "Block":
        """Return the n-th part."""
        if self.parts == 1:
            return self
        run = (self.rows.stop - self.rows.start) // self.parts
        row, time = self.rows.start + n * run, self.first + n * run
        return Block(slice(row, row + run), time, time + run - 1)

    def each(self) -> Iterator["Block"]:
        """Iterate over the parts."""
        return (self.part(n) for n in range(self.parts))

    def band(self, window: int | None) -> slice:
        """Return the keys that at least one of a part's queries sees."""
        return slice(0 if window is None else max(0, self.first - window + 1), self.last + 1)

    def lies_like(self, other: "Block", window: int | None) -> bool:
        """Return True if both are runs of equal length and position in their bands, and thus share a bias."""
        mine, its = ((x.first - x.band(window).start, x.last - x.first) for x in (self, other))
        return self.is_run and other.is_run and mine == its

    def split(self, x: Float[Tensor, "*lead block"]) -> Float[Tensor, "parts *lead run"]:
        """Move the parts to a new first axis."""
        return x.unflatten(-1, (self.parts, -1)).movedim(-2, 0)

    def join(self, x: Float[Tensor, "parts *lead run"]) -> Float[Tensor, "*lead block"]:
        """Undo `split`."""
        return x.movedim(0, -2).flatten(-2)


class Bias(NamedTuple):
    """The initial scores of a block, and its first part."""

    first: Block
    bias: Float[Tensor, "parts_or_1 rows_or_1 1 run span"]


def cut_blocks(queries: Queries, *sides: Side) -> Iterator[Block]:
    """Split the needed queries into blocks such that no tile is too large and few scores are hidden."""
    columns = max(side.queries.shape[0] * side.queries.shape[1] for side in sides)
    windows = [side.window for side in sides if side.window is not None]
    window = max(windows) if len(windows) == len(sides) else None
    reach = None if window is None else max(window // 4, LEAST_REACH)
    tile = CPU_TILE if queries.times.device.type == "cpu" else TILE
    times = queries.times.tolist()

    def block(start: int, stop: int) -> Block:
        return Block(slice(start, stop), times[start], times[stop - 1])

    def scores(part: Block) -> int:
        band = part.band(window)
        return columns * (part.rows.stop - part.rows.start) * (band.stop - band.start)

    def too_large(start: int, stop: int) -> bool:
        part = block(start, stop)
        return scores(part) > tile or (reach is not None and part.last - part.first >= reach)

    start = 0
    while start < len(times):
        longer = range(start + 2, len(times) + 1)
        part = block(start, start + 1 + bisect_left(longer, True, key=partial(too_large, start)))
        run, parts = part.rows.stop - start, 1
        if window is not None and part.is_run and part.first >= window - 1:  # a full band, as in the next blocks
            parts = max(1, min(tile // scores(part), (len(times) - start) // run))
            while not block(start, start + parts * run).is_run:
                parts -= 1
        yield block(start, start + parts * run)._replace(parts=parts)
        start += parts * run
