"""Blocks of tokens at fixed positions of their document, such as gradient chunks and segments.

A document's first block starts at its first token, and every `size` tokens fill a block, independently of the rest of
the row and of how the row is fed in. A packed, padded or streamed document is therefore cut like a document that is
read alone. The tokens of a block are moved together; unused slots are marked invalid.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from .documents import document_starts


class Blocks(NamedTuple):
    """Indices of each row's tokens by block, and flags of blocks that begin in this call or begin a document."""

    times: Int[Tensor, "batch blocks width"]  # time of the block's w-th token, 0 for empty slots
    valid: Bool[Tensor, "batch blocks width"]
    begins: Bool[Tensor, "batch blocks"]  # the block's first slot is filled in this call, not in an earlier one
    new_document: Bool[Tensor, "batch blocks"]
    place: Int[Tensor, "batch time"]  # block * width + w of each token; 0 for masked tokens
    filled: Int[Tensor, " batch"]  # number of filled slots in the row's last block; 0 if it is full

    def gather(self, x: Shaped[Tensor, "batch heads time *dim"]) -> Shaped[Tensor, "blocks batch heads width *dim"]:
        """Gather time into blocks along a new leading axis."""
        batch, blocks, width = self.times.shape
        index = self.times.view(batch, 1, blocks * width, *(1,) * (x.dim() - 3))
        taken = x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))
        return taken.unflatten(2, (blocks, width)).movedim(2, 0)

    def scatter(self, x: Shaped[Tensor, "blocks batch heads width *dim"]) -> Shaped[Tensor, "batch heads time *dim"]:
        """Scatter blocks back to time; masked tokens get arbitrary values of other tokens."""
        flat = x.movedim(0, 2).flatten(2, 3)
        index = self.place.view(len(self.place), 1, -1, *(1,) * (flat.dim() - 3))
        return flat.gather(2, index.expand(-1, flat.shape[1], -1, *flat.shape[3:]))


def split_blocks(
    time: int,
    size: int,
    filled: Int[Tensor, " batch"],
    document_ids: Int[Tensor, "batch time"] | None = None,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Blocks:
    """Split rows of `time` tokens into blocks of `size`; each row's open block already holds `filled` tokens."""
    batch, device = len(filled), filled.device
    clock = torch.arange(time, device=device)
    mask = torch.ones(batch, time, dtype=torch.bool, device=device) if mask is None else mask
    starts = torch.zeros_like(mask) if document_ids is None else document_starts(document_ids, mask)

    count = mask.cumsum(1)  # number of valid tokens up to and including this one
    before_document = torch.where(starts, count - 1, -1).cummax(1).values  # number of valid tokens before its document
    carried = torch.where(before_document < 0, filled[:, None], 0)
    position = count - 1 - before_document.clamp(min=0) + carried
    opens = mask & (position % size == 0)
    goes_on = (filled > 0).long()[:, None]  # 1 if block 0 was begun by an earlier call
    block = opens.cumsum(1) - 1 + goes_on
    slot = position % size - torch.where((block == 0) & (goes_on > 0), filled[:, None], 0)

    blocks = int(block.max()) + 1 if time else 0
    width = int(torch.where(mask, slot, 0).max()) + 1 if time else 0
    # Masked tokens are written past the end and cut off afterwards.
    target = torch.where(mask, block * width + slot, blocks * width)
    index = torch.zeros(batch, blocks * width + 1, dtype=torch.long, device=device)
    index.scatter_(1, target, clock.expand(batch, -1))
    valid = torch.zeros_like(index, dtype=torch.bool).scatter_(1, target, True)
    block_of = torch.where(mask, block, blocks)

    def any_in_block(flag: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch blocks"]:
        hits = torch.zeros(batch, blocks + 1, dtype=torch.long, device=device)
        return hits.scatter_add_(1, block_of, flag.long())[:, :-1] > 0

    last = torch.where(mask, clock, -1).amax(1) if time else filled - 1
    end = position.gather(1, last.clamp(min=0)[:, None])[:, 0] + 1 if time else filled
    return Blocks(
        times=index[:, :-1].view(batch, blocks, width),
        valid=valid[:, :-1].view(batch, blocks, width),
        begins=any_in_block(opens),
        new_document=any_in_block(starts),
        place=torch.where(mask, target, 0),
        filled=torch.where(last >= 0, end, filled) % size,
    )


def even_blocks(batch: int, time: int, size: int, device: torch.device, filled: int = 0) -> Blocks:
    """Compute `split_blocks` for rows of one unpadded document with equally filled blocks, without reading any data."""
    clock = torch.arange(time, device=device)
    block, blocks = (filled + clock) // size, -(-(filled + time) // size)
    opens = torch.arange(blocks, device=device) * size - filled  # time of each block's first slot
    begin, end = opens.clamp(min=0), (opens + size).clamp(max=time)
    width = min(max(size - filled, time - (size - filled)), time, size)
    times = begin[:, None] + torch.arange(width, device=device)
    valid = times < end[:, None]
    return Blocks(
        times=times.where(valid, 0).expand(batch, -1, -1),
        valid=valid.expand(batch, -1, -1),
        begins=(opens >= 0).expand(batch, -1),
        new_document=torch.zeros(batch, blocks, dtype=torch.bool, device=device),
        place=(block * width + clock - begin[block]).expand(batch, -1),
        filled=torch.full((batch,), (filled + time) % size, device=device),
    )
