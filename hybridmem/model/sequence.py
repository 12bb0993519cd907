"""Positions, documents and padding of the tokens in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybridmem_kernels.documents import document_starts

PADDING = -1  # document id of padding
NOWHERE = -2  # document id of places that hold no token


class LastDocument(NamedTuple):
    """The document that each row was in when a call ended."""

    id: Int[Tensor, " batch"]  # the caller's id; PADDING: no token of the row has been read yet
    number: Int[Tensor, " batch"]  # the number of earlier documents in the row


class Compaction(NamedTuple):
    """Permutation that moves each row's tokens to the front, in order, and its padding to the end."""

    order: Int[Tensor, "batch time"]  # the source index of each compacted token
    place: Int[Tensor, "batch time"]  # the target index of each token, the inverse of `order`

    def compact(self, x: Shaped[Tensor, "batch time *rest"]) -> Shaped[Tensor, "batch time *rest"]:
        """Move each row's tokens to the front."""
        return _take(x, self.order)

    def restore(self, x: Shaped[Tensor, "batch time *rest"]) -> Shaped[Tensor, "batch time *rest"]:
        """Move tokens back, undoing `compact`."""
        return _take(x, self.place)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.view(*index.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def known_true(condition: Bool[Tensor, ""]) -> bool:
    """Return True if `condition` is known to hold, so that a shortcut may be taken.

    Reading data would break a compiled graph in two. While a graph is compiled the result is False, and the graph
    contains the general case.
    """
    return not torch.compiler.is_compiling() and bool(condition)


class HeadChoice(NamedTuple):
    """Sources of `mah` heads in one forward pass, which override the configuration."""

    sources: Sequence[Sequence[str]] | None  # a list for each layer; None: as configured
    full_share: Float[Tensor, "rows layers kv_heads *time"] | None  # mixes `full` with the head's own source
    all_full: bool = False  # every share is 1: other sources only keep their states


@dataclass
class TokenSequence:
    """Properties of the tokens of one forward pass, shared by all layers.

    Args:
        cos, sin: rotary angles of every token; None if no layer has attention.
        document_ids: each token's document number within its row, PADDING (-1) for padding; None: one document, no
            padding.
        mask: False for padding; None: no padding.
        fresh_rows: rows whose first token does not continue the cache's document; None: no row.
        compaction: permutation that removes padding between tokens, for layers whose range is counted in tokens; None:
            padding precedes all tokens of its row, earlier calls included, or follows all tokens of this call.
        last_document: the document of each row at the end of the call; None: the only document.
        past: number of tokens that earlier calls read.
        heads: sources of `mah` heads; None: as configured.
        writes: False for tokens that the layer's memory skips; None: as its router decides, or none.
        decodes: the call is one token per row, which continues its document, without gradients; layers may overwrite
            their states in the cache.
        memo: intermediate results that layers share.
    """

    cos: Float[Tensor, "rows 1 time half"] | None = None
    sin: Float[Tensor, "rows 1 time half"] | None = None
    document_ids: Int[Tensor, "batch time"] | None = None
    mask: Bool[Tensor, "batch time"] | None = None
    fresh_rows: Bool[Tensor, " batch"] | None = None
    compaction: Compaction | None = None
    last_document: LastDocument | None = None
    past: int = 0
    heads: HeadChoice | None = None
    writes: Bool[Tensor, "batch time"] | None = None
    decodes: bool = False
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def angles(self) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), which must exist."""
        assert self.cos is not None
        assert self.sin is not None
        return self.cos, self.sin


def check_mask(attention_mask: Tensor | None, shape: tuple[int, int]) -> None:
    """Raise a ValueError unless a mask covers a call's tokens."""
    batch, time = shape
    if attention_mask is not None and (
        attention_mask.dim() != 2 or len(attention_mask) != batch or attention_mask.shape[1] < time
    ):
        raise ValueError(
            f"attention_mask must be (batch, length), 0 for padding, over these {time} tokens of {batch} rows or over "
            f"all read so far, got {tuple(attention_mask.shape)}"
        )


def read_documents(
    shape: tuple[int, int],
    document_ids: Int[Tensor, "batch time"] | None,
    attention_mask: Tensor | None,
    position_ids: Int[Tensor, "batch time"] | None,
    last_document: Int[Tensor, " batch"] | None,
) -> Int[Tensor, "batch time"] | None:
    """Return the document of every token, PADDING for padding; None if there is one document and no padding.

    `attention_mask` marks padding, over this call's tokens or over all tokens so far (as transformers passes it).
    Without a mask, each of `position_ids` that does not increase by one starts a document, as in transformers; with
    `position_ids=None`, positions start no document. Tokens continue `last_document` of earlier calls by default.
    """
    batch, time = shape
    check_mask(attention_mask, shape)
    if document_ids is not None and document_ids.shape != shape:
        raise ValueError(f"document_ids must be (batch, time) = {shape}, got {tuple(document_ids.shape)}")
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, attention_mask.shape[1] - time :] == 0
        if known_true(~padding.any()):
            padding = None
    if document_ids is None:
        if last_document is not None:
            document_ids = last_document.clamp(min=0)[:, None].expand(batch, time)
        elif attention_mask is None and position_ids is not None and time > 1:
            jumps = position_ids.diff(dim=1) != 1
            if not known_true(~jumps.any()):
                counts = torch.nn.functional.pad(jumps.long(), (1, 0)).cumsum(1)
                document_ids = counts.expand(batch, time)
    if padding is not None:
        document_ids = torch.zeros_like(padding, dtype=torch.long) if document_ids is None else document_ids
        document_ids = document_ids.masked_fill(padding, PADDING)
    return document_ids


def rows_starting_afresh(
    document_ids: Int[Tensor, "batch time"], last_document: LastDocument | None
) -> Bool[Tensor, " batch"] | None:
    """Mark the rows whose first valid token starts a new document; return None without such rows."""
    if last_document is None:
        return None
    before = last_document.id
    first = (document_ids != PADDING).long().argmax(1, keepdim=True)
    now = document_ids.gather(1, first)[:, 0]
    fresh = (now != PADDING) & (before != PADDING) & (now != before)
    return None if known_true(~fresh.any()) else fresh


def splits_tokens(mask: Bool[Tensor, "batch time"], begun: Bool[Tensor, " batch"] | None = None) -> Bool[Tensor, ""]:
    """Check for padding between two tokens of a row; `begun` marks rows with tokens in earlier calls."""
    earlier = mask.cumsum(1)[:, :-1] > 0
    if begun is not None:
        earlier = earlier | begun[:, None]
    return (mask[:, 1:] & ~mask[:, :-1] & earlier).any()


def compact_rows(mask: Bool[Tensor, "batch time"], begun: Bool[Tensor, " batch"]) -> Compaction | None:
    """Compute the permutation that removes padding between tokens; return None if there is no such padding.

    `begun` marks the rows with tokens in earlier calls: padding at their start separates tokens, too.
    """
    if known_true(~splits_tokens(mask, begun)):
        return None
    count = mask.cumsum(1)
    place = torch.where(mask, count, count[:, -1:] + (~mask).cumsum(1)) - 1
    clock = torch.arange(mask.shape[1], device=mask.device).expand_as(place)
    return Compaction(torch.empty_like(place).scatter_(1, place, clock), place)


def number_documents(
    document_ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"] | None,
    fresh_rows: Bool[Tensor, " batch"] | None,
    last_document: LastDocument | None,
) -> tuple[Int[Tensor, "batch time"], LastDocument]:
    """Number each row's documents consecutively over all calls; an id that reappears later is a new document.

    Return the number of every token's document, PADDING for padding, and the last document of each row.
    """
    numbers = document_starts(document_ids, mask).long().cumsum(1)
    if fresh_rows is not None:
        numbers = numbers + fresh_rows[:, None]
    if last_document is not None:
        numbers = numbers + last_document.number[:, None]
    if mask is None:
        return numbers, LastDocument(document_ids[:, -1], numbers[:, -1])
    time = torch.arange(mask.shape[1], device=mask.device)
    end = torch.where(mask, time, -1).amax(1)
    ids, last_numbers = (x.gather(1, end.clamp(min=0)[:, None])[:, 0] for x in (document_ids, numbers))
    if last_document is None:  # a row with only padding has no document yet: its id is PADDING
        last_document = LastDocument(torch.full_like(ids, PADDING), torch.zeros_like(ids))
    last = LastDocument(
        torch.where(end >= 0, ids, last_document.id), torch.where(end >= 0, last_numbers, last_document.number)
    )
    return numbers.where(mask, PADDING), last


def rotary_angles(
    position_ids: Int[Tensor, "rows time"], dim: int, theta: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "rows 1 time half"], Float[Tensor, "rows 1 time half"]]:
    """Return cosine and sine of the rotation angles of `dim` channels at every position, computed in float64.

    In float32, the angle at position 2,000,000 would be wrong by a quarter of a radian.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=position_ids.device) / dim
    angles = position_ids.to(torch.float64)[:, None, :, None] * theta**-exponent
    return angles.cos().to(dtype), angles.sin().to(dtype)


def pretrained_rotary_angles(
    position_ids: Int[Tensor, "rows time"],
    inverse_frequencies: Sequence[float],
    scaling: float,
    context: int,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "rows 1 time half"], Float[Tensor, "rows 1 time half"]]:
    """Return cosine and sine of a pretrained model's rotary embedding, times its attention factor.

    Within the model's context the angles are float32 products, as in transformers and in the model's training, so that
    logits agree. Beyond the context, and in float64 models, they are float64 products.
    """
    frequencies = torch.tensor(inverse_frequencies, dtype=torch.float64, device=position_ids.device)
    positions = position_ids[:, None, :, None]
    precise = positions.to(torch.float64) * frequencies
    if dtype == torch.float64:
        return precise.cos() * scaling, precise.sin() * scaling
    trained, inside = positions.float() * frequencies.float(), positions < context
    cos, sin = (torch.where(inside, f(trained), f(precise).float()) * scaling for f in (torch.cos, torch.sin))
    return cos.to(dtype), sin.to(dtype)


def inverse_frequencies(config: Any) -> tuple[tuple[float, ...], float]:
    """Return frequencies and attention factor of `config.rope_parameters`, as transformers computes them."""
    with torch.device("cpu"):  # models may be built on the meta device, which holds no values
        if config.rope_parameters["rope_type"] == "default":
            exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float) / config.rotary_dim
            return tuple((1.0 / config.rope_parameters["rope_theta"] ** exponent).tolist()), 1.0
        frequencies, scaling = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    return tuple(frequencies.tolist()), scaling
