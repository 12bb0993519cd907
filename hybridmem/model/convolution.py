"""Short causal convolution before the memory, and optionally before a baseline's attention."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .functional import causal_convolution
from .sequence import NOWHERE, PADDING, TokenSequence


class ConvolutionState(NamedTuple):
    """The last `kernel - 1` tokens read, without padding, and their documents (None: a single document)."""

    tail: Float[Tensor, "batch taps channels"]
    document_ids: Int[Tensor, "batch taps"] | None


class ShortConvolution(nn.Module):
    """Depthwise causal convolution that supports streaming, skips padding and respects document boundaries.

    Args:
        channels: width of input and output.
        kernel: number of tokens that an output depends on, the current one included.
    """

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))

    def forward(
        self, x: Float[Tensor, "batch time channels"], state: ConvolutionState | None, sequence: TokenSequence
    ) -> tuple[Float[Tensor, "batch time channels"], ConvolutionState]:
        """Convolve `x`; return the output and the next state."""
        return convolve(x, self.weight, state, sequence)


def convolve(
    x: Float[Tensor, "batch time channels"],
    weight: Float[Tensor, "channels kernel"],
    state: ConvolutionState | None,
    sequence: TokenSequence,
) -> tuple[Float[Tensor, "batch time channels"], ConvolutionState]:
    """Apply `ShortConvolution` with a given weight."""
    if sequence.decodes and state is not None:
        return _convolve_token(x, weight, state, sequence)
    batch, time, channels = x.shape
    now, mask, compaction = sequence.document_ids, sequence.mask, sequence.compaction
    if now is None and mask is not None:
        now = torch.where(mask, 0, PADDING)
    if compaction is not None:
        assert now is not None
        x, now = compaction.compact(x), compaction.compact(now)
        mask = now != PADDING
    taps = weight.shape[1] - 1
    tail = x.new_zeros(batch, taps, channels) if state is None else state.tail.to(x.dtype)
    extended = torch.cat((tail, x), dim=1)
    documents = _extended_documents(x, now, taps, state, sequence.fresh_rows)
    same_document = None
    if documents is not None:
        same_document = documents.unfold(1, taps + 1, 1) == documents[:, taps:, None]
    out = causal_convolution(extended, weight, same_document)
    end = torch.full((batch, 1), time, device=x.device)
    if mask is not None:
        clock = torch.arange(1, time + 1, device=x.device)
        end = torch.where(mask, clock, 0).amax(1, keepdim=True)
    kept = end + torch.arange(taps, device=x.device)
    new_tail = extended.gather(1, kept[..., None].expand(-1, -1, channels))
    out = out if compaction is None else compaction.restore(out)
    if documents is None:
        return out, ConvolutionState(new_tail, None)
    of_tail = documents.gather(1, kept)
    # No later token sees those of another document than the last one: as zeros, they need no mask in decoding.
    return out, ConvolutionState(new_tail * (of_tail == of_tail[:, -1:])[..., None], of_tail)


def _convolve_token(
    x: Float[Tensor, "batch 1 channels"],
    weight: Float[Tensor, "channels kernel"],
    state: ConvolutionState,
    sequence: TokenSequence,
) -> tuple[Float[Tensor, "batch 1 channels"], ConvolutionState]:
    """Convolve a token that continues the document of the tail."""
    extended, before, now = torch.cat((state.tail.to(x.dtype), x), dim=1), state.document_ids, sequence.document_ids
    documents = None
    if before is not None or now is not None:
        zeros = torch.zeros_like(extended[:, 1:, 0], dtype=torch.long)
        before, now = zeros if before is None else before, zeros[:, :1] if now is None else now
        documents = torch.cat((before[:, 1:], now), dim=1)
    return causal_convolution(extended, weight), ConvolutionState(extended[:, 1:], documents)


def _extended_documents(
    x: Tensor, now: Tensor | None, taps: int, state: ConvolutionState | None, fresh_rows: Tensor | None
) -> Int[Tensor, "batch read"] | None:
    """Concatenate the documents of the tail and the tokens; return None if there is only one document."""
    before = None if state is None else state.document_ids
    if before is None and now is None and fresh_rows is None:
        return None
    zeros = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    now = zeros if now is None else now
    if before is None:
        # The tail is zeros, or belongs to document 0 if earlier calls passed no document ids.
        before = torch.full((x.shape[0], taps), NOWHERE if state is None else 0, device=x.device)
    if fresh_rows is not None:
        before = before.masked_fill(fresh_rows[:, None], NOWHERE)
    return torch.cat((before, now), dim=1)
