"""Blocks of tokens at fixed positions of their document: gradient chunks, segments.

A document's first block starts at its first token, and every `size` tokens of it fill a block, whatever else
is in the row and however the row is fed in. So a packed, padded or streamed document is cut where it is cut
alone. Tokens of a block are moved together here; what is left over is marked invalid.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from .documents import document_starts


class Blocks(NamedTuple):
    """Tokens of a row's n-th block, and flags of the blocks that begin something."""

    times: Int[Tensor, "batch blocks width"]  # time of the block's w-th token, 0 where there is none
    valid: Bool[Tensor, "batch blocks width"]
    begins: Bool[Tensor, "batch blocks"]  # the block's first slot is filled here, not by an earlier call
    new_document: Bool[Tensor, "batch blocks"]
    place: Int[Tensor, "batch time"]  # block * width + w of each token; 0 for masked ones
    filled: Int[Tensor, " batch"]  # slots taken in the row's last block; 0 when it is full

    def gather(self, x: Shaped[Tensor, "batch heads time *dim"]) -> Shaped[Tensor, "blocks batch heads width *dim"]:
        """Bring time into blocks, blocks in front."""
        batch, blocks, width = self.times.shape
        index = self.times.view(batch, 1, blocks * width, *(1,) * (x.dim() - 3))
        taken = x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))
        return taken.unflatten(2, (blocks, width)).movedim(2, 0)

    def scatter(self, x: Shaped[Tensor, "blocks batch heads width *dim"]) -> Shaped[Tensor, "batch heads time *dim"]:
        """Bring blocks back into time; masked tokens get some other token's values."""
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
    """Cut rows of `time` tokens into blocks of `size`; the row's last block before held `filled` tokens."""
    batch, device = len(filled), filled.device
    clock = torch.arange(time, device=device)
    mask = torch.ones(batch, time, dtype=torch.bool, device=device) if mask is None else mask
    starts = torch.zeros_like(mask) if document_ids is None else document_starts(document_ids, mask)

    count = mask.cumsum(1)  # valid tokens up to and with this one
    before_document = torch.where(starts, count - 1, -1).cummax(1).values  # valid tokens before its document
    carried = torch.where(before_document < 0, filled[:, None], 0)
    position = count - 1 - before_document.clamp(min=0) + carried
    opens = mask & (position % size == 0)
    goes_on = (filled > 0).long()[:, None]  # block 0 is then the one that was begun earlier
    block = opens.cumsum(1) - 1 + goes_on
    slot = position % size - torch.where((block == 0) & (goes_on > 0), filled[:, None], 0)

    blocks = int(block.max()) + 1 if time else 0
    width = int(torch.where(mask, slot, 0).max()) + 1 if time else 0
    # Masked tokens are written past the end, then cut off.
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
    """`split_blocks` of rows that are one document, unpadded, and as full each: known without a look at the data."""
    clock = torch.arange(time, device=device)
    block, blocks = (filled + clock) // size, -(-(filled + time) // size)
    opens = torch.arange(blocks, device=device) * size - filled  # where blocks have their first slot
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
