"""What one forward pass knows about its tokens: where they stand, and which document they belong to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybridmem_kernels.documents import document_starts

PADDING = -1  # the document of tokens that do not count
NOWHERE = -2  # the document of places that hold no token


class LastDocument(NamedTuple):
    """The document that each row was in when a call ended."""

    id: Int[Tensor, " batch"]  # what the caller called it; PADDING: no token of the row was read yet
    number: Int[Tensor, " batch"]  # how many documents the row had before it


class Compaction(NamedTuple):
    """A permutation that moves each row's tokens together to its front, in order, and its padding to the end."""

    order: Int[Tensor, "batch time"]  # where the token at each compacted place comes from
    place: Int[Tensor, "batch time"]  # where each token goes: the inverse of `order`

    def compact(self, x: Shaped[Tensor, "batch time *rest"]) -> Shaped[Tensor, "batch time *rest"]:
        """Move tokens together."""
        return _take(x, self.order)

    def restore(self, x: Shaped[Tensor, "batch time *rest"]) -> Shaped[Tensor, "batch time *rest"]:
        """Move tokens back: the inverse of `compact`."""
        return _take(x, self.place)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.view(*index.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def known_true(condition: Bool[Tensor, ""]) -> bool:
    """Whether a shortcut may be taken, because `condition` holds.

    A compiled graph cannot look at data without breaking in two: while one is made the answer is no, and it does what
    is right in any case.
    """
    return not torch.compiler.is_compiling() and bool(condition)


class HeadChoice(NamedTuple):
    """The sources that heads of `mah` read in one forward pass, in place of the configuration's."""

    sources: Sequence[Sequence[str]] | None  # a list for each layer; None: the configuration's
    full_share: Float[Tensor, "rows layers kv_heads"] | None  # mixes `full` with the head's own source
    all_full: bool = False  # every share is 1: other sources only keep their states


@dataclass
class TokenSequence:
    """The tokens of a forward pass, seen by every layer alike.

    Args:
        cos, sin: rotary angles of every token; None where no attention needs them.
        document_ids: each document's number in its row, PADDING (-1) for tokens that do not count; None: one
            document, no padding.
        mask: which tokens count; None: all.
        fresh_rows: rows whose first token does not continue what the cache holds; None: no row.
        compaction: moves together tokens that padding separates, for layers whose reach is counted in tokens; None:
            padding precedes all tokens of its row, earlier calls' included, or follows all of this call's.
        last_document: where the call ends; None: in the one document that there is.
        past: tokens that earlier calls read.
        heads: the sources that heads of `mah` read; None: the configuration's.
        memo: what layers work out from the above and share.
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
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def angles(self) -> tuple[Tensor, Tensor]:
        """(cos, sin), where attention needs them."""
        assert self.cos is not None
        assert self.sin is not None
        return self.cos, self.sin


def read_documents(
    shape: tuple[int, int],
    document_ids: Int[Tensor, "batch time"] | None,
    attention_mask: Tensor | None,
    position_ids: Int[Tensor, "batch time"] | None,
    last_document: Int[Tensor, " batch"] | None,
) -> Int[Tensor, "batch time"] | None:
    """The document of every token, PADDING for padding; None if there is one document and no padding.

    `attention_mask` marks padding, over this call's tokens or over all that was ever read (as transformers
    passes it). Without a mask, `position_ids` that do not go up by one start a document, as in transformers; None:
    positions start none. `last_document` is what earlier calls left: tokens go on with it unless told otherwise.
    """
    batch, time = shape
    if attention_mask is not None and (
        attention_mask.dim() != 2 or len(attention_mask) != batch or attention_mask.shape[1] < time
    ):
        raise ValueError(
            f"attention_mask must be (batch, length), 0 for padding, over these {time} tokens of {batch} rows or over "
            f"all read so far, got {tuple(attention_mask.shape)}"
        )
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
    """Rows whose first valid token belongs to another document than the cache; None if there is none."""
    if last_document is None:
        return None
    before = last_document.id
    first = (document_ids != PADDING).long().argmax(1, keepdim=True)
    now = document_ids.gather(1, first)[:, 0]
    fresh = (now != PADDING) & (before != PADDING) & (now != before)
    return None if known_true(~fresh.any()) else fresh


def splits_tokens(mask: Bool[Tensor, "batch time"], begun: Bool[Tensor, " batch"] | None = None) -> Bool[Tensor, ""]:
    """Check for padding between two tokens of a row; `begun` marks rows of which tokens were read earlier."""
    earlier = mask.cumsum(1)[:, :-1] > 0
    if begun is not None:
        earlier = earlier | begun[:, None]
    return (mask[:, 1:] & ~mask[:, :-1] & earlier).any()


def compact_rows(mask: Bool[Tensor, "batch time"], begun: Bool[Tensor, " batch"]) -> Compaction | None:
    """Move together the tokens of each row; None if no padding lies between two of them.

    `begun` marks the rows of which earlier calls have read tokens: padding at their start separates tokens too.
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
    """Count each row's documents, over all calls: an id that comes back later is another document.

    Returns the number of every token's document, PADDING for padding, and where the call ends.
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
    if last_document is None:  # a row of padding holds no document yet: its id is PADDING
        last_document = LastDocument(torch.full_like(ids, PADDING), torch.zeros_like(ids))
    last = LastDocument(
        torch.where(end >= 0, ids, last_document.id), torch.where(end >= 0, last_numbers, last_document.number)
    )
    return numbers.where(mask, PADDING), last


def rotary_angles(
    position_ids: Int[Tensor, "rows time"], dim: int, theta: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "rows 1 time half"], Float[Tensor, "rows 1 time half"]]:
    """Cosine and sine of the angles by which `dim` channels turn at every position, taken in float64.

    In float32 the angle at position 2,000,000 is wrong by a quarter of a radian.
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

    Within the model's context the angles are float32 products, as transformers takes them and as the model was
    trained, so that logits agree. Beyond it, and in float64 models, they are float64 products.
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
    with torch.device("cpu"):  # models are also built on the meta device, which holds no numbers
        if config.rope_parameters["rope_type"] == "default":
            exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float) / config.rotary_dim
            return tuple((1.0 / config.rope_parameters["rope_theta"] ** exponent).tolist()), 1.0
        frequencies, scaling = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    return tuple(frequencies.tolist()), scaling
