"""Short-range attention over a sliding window, a segment or the whole past, plus always-visible persistent tokens."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration import HybridMemConfig
from .convolution import ConvolutionState, ShortConvolution
from .functional import block_pairs, linear_rows, rotate
from .sequence import NOWHERE, TokenSequence, known_true, splits_tokens
from .state import KeyBuffer, PlainKeys, key_buffer, map_state

MASK_DECODING = ("sdpa", "eager")  # attention functions that take one token's mask, or none, as it is


class AttentionState(NamedTuple):
    """Rotated keys and values that later tokens can still see, and their documents (None: a single document)."""

    past: PlainKeys | KeyBuffer
    document_ids: Int[Tensor, "batch past"] | None
    convolution: ConvolutionState | None

    @property
    def keys(self) -> Float[Tensor, "batch kv_heads past dim"]:
        """Return the keys."""
        return self.past.keys

    @property
    def values(self) -> Float[Tensor, "batch kv_heads past dim"]:
        """Return the values."""
        return self.past.values


@dataclass
class Visibility:
    """Visibility of keys: a query sees persistent keys, and earlier keys of its document within the window.

    Keys are ordered [persistent, others]; times and documents describe the others. `rows` is 1, the batch size, or
    the number of folded blocks.
    """

    query_time: Int[Tensor, " queries"]
    key_time: Int[Tensor, " keys"]
    num_persistent: int = 0
    window: int | None = None
    query_documents: Int[Tensor, "rows queries"] | None = None
    key_documents: Int[Tensor, "rows keys"] | None = None
    _dense: Tensor | None = field(default=None, init=False, repr=False)

    def __call__(self, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return True where `query` sees `key`; this is a mask_mod of flex_attention."""
        other = (key - self.num_persistent).clamp(min=0)
        distance = self.query_time[query] - self.key_time[other]
        seen = distance >= 0
        if self.window is not None:
            seen = seen & (distance < self.window)
        if self.query_documents is not None and self.key_documents is not None:
            seen = seen & (self.query_documents[row, query] == self.key_documents[row, other])
        return seen | (key < self.num_persistent)

    @property
    def dense(self) -> Bool[Tensor, "rows 1 queries keys"]:
        """Return the visibility as a dense mask, built once and cached."""
        if self._dense is None:
            self._dense = self._make_dense()
        return self._dense

    def _make_dense(self) -> Bool[Tensor, "rows 1 queries keys"]:
        rows = 1 if self.query_documents is None else len(self.query_documents)
        device = self.query_time.device
        queries, keys = len(self.query_time), self.num_persistent + len(self.key_time)
        row, query, key = (torch.arange(n, device=device) for n in (rows, queries, keys))
        return self(row[:, None, None, None], row, query[None, None, :, None], key[None, None, None, :])


def eager_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys dim"],
    attention_mask: Float[Tensor, "rows 1 queries keys"] | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "batch queries heads dim"], Float[Tensor, "batch heads queries keys"]]:
    """Compute attention in plain PyTorch and return its weights, with the signature that transformers expects."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    precise = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = F.softmax(scores, dim=-1, dtype=precise).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class ShortRangeAttention(nn.Module):
    """Grouped-query attention with rotary positions and persistent tokens.

    The implementation comes from transformers' registry: `eager`, `sdpa`, `flex_attention`, `flash_attention_2`
    or a custom registered function. Under sdpa, a window is folded into blocks, so that it costs time · window.

    Args:
        config: the model's configuration.
        layer_idx: the layer's index, which attention functions may read.
        window: number of tokens that a token sees, itself included; None: its whole past.
    """

    def __init__(self, config: HybridMemConfig, layer_idx: int, window: int | None):
        super().__init__()
        self.config, self.layer_idx, self.window = config, layer_idx, window
        self.attention_dropout = config.attention_dropout
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.num_key_value_groups = self.heads // self.kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        channels = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, channels, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.persistent_tokens = (
            nn.Parameter(torch.empty(config.num_persistent_tokens, config.hidden_size))
            if config.num_persistent_tokens
            else None
        )
        self.convolution = ShortConvolution(channels, config.memory_conv_size) if config.attention_conv else None

    def forward(
        self, x: Float[Tensor, "batch time hidden"], state: AttentionState | None, sequence: TokenSequence
    ) -> tuple[Float[Tensor, "batch time hidden"], AttentionState, Tensor | None]:
        """Attend along `x`; return the output, the next state, and the attention weights if available.

        Columns of the weights are [persistent tokens, kept keys, `x`].
        """
        q, k, v, convolution = self.project(x, None if state is None else state.convolution, sequence)
        if sequence.decodes and state is not None and self.config._attn_implementation in MASK_DECODING:
            return self._decode(q, k, v, state, convolution, sequence)
        documents = _documents(sequence, state, x)
        keys, values = k, v
        if state is not None:
            keys, values = (
                torch.cat((state.keys.to(k.dtype), k), 2),
                torch.cat((state.values.to(v.dtype), v), 2),
            )
        fold = self.config._attn_implementation == "sdpa" and self.window is not None and x.shape[1] > self.window
        attend = self._attend_folded if fold else self._attend_in_order
        out, weights = attend(q, keys, values, documents, sequence)
        kept = keys.shape[2] if self.window is None else min(self.window - 1, keys.shape[2])
        new_state = AttentionState(
            PlainKeys(_last(keys, kept, 2), _last(values, kept, 2)),
            map_state(lambda d: _last(d, kept, 1), documents),
            convolution,
        )
        return self.o_proj(out.flatten(-2)), new_state, weights

    def _decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: AttentionState,
        convolution: ConvolutionState | None,
        sequence: TokenSequence,
    ) -> tuple[Tensor, AttentionState, Tensor | None]:
        """Attend from one token to the keys in a buffer, which takes its own."""
        past = state.past
        if isinstance(past, PlainKeys):
            past = key_buffer(past.keys.to(k.dtype), past.values.to(v.dtype), self.front(k))
        buffer = past.followed_by(k, v)
        documents, mask = decoding_mask(
            sequence, state.document_ids, buffer.stop - buffer.start - 1, self.num_persistent, self.config, q
        )
        out, weights = self._call(q, *buffer.seen, mask)
        if self.window is not None:
            buffer = buffer.last(self.window - 1)
            documents = None if documents is None else documents[:, 1 - self.window :]
        return self.o_proj(out.flatten(-2)), AttentionState(buffer, documents, convolution), weights

    def attend_seen(self, q: Tensor, buffer: KeyBuffer) -> Float[Tensor, "batch 1 hidden"]:
        """Attend from one token to all that a buffer holds."""
        return self.o_proj(self._call(q, *buffer.seen, None)[0].flatten(-2))

    def front(self, like: Tensor) -> Float[Tensor, "batch two kv_heads front dim"]:
        """Return the persistent tokens' keys and values for every row."""
        return torch.stack(self._front(like)).expand(len(like), -1, -1, -1, -1)

    def _front(self, like: Tensor) -> tuple[Float[Tensor, "kv_heads front dim"], Float[Tensor, "kv_heads front dim"]]:
        """Return the persistent tokens' keys and values, which are empty without such tokens."""
        if self.persistent_tokens is None:
            nothing = like.new_empty(self.kv_heads, 0, self.head_dim)
            return nothing, nothing
        return self._persistent(self.persistent_tokens, like.dtype)

    def project(
        self, x: Float[Tensor, "batch time hidden"], state: ConvolutionState | None, sequence: TokenSequence
    ) -> tuple[Tensor, Tensor, Tensor, ConvolutionState | None]:
        """Return rotated queries, rotated keys, values, and the convolution's state."""
        qkv = self.qkv_proj(x)
        if self.convolution is not None:
            qkv, state = self.convolution(qkv, state, sequence)
        cos, sin = (angles.to(qkv.dtype) for angles in sequence.angles)
        heads = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turning, v = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(turning, cos, sin).split((self.heads, self.kv_heads), dim=1)
        return q, k, v, state

    def keys_and_values(
        self, x: Float[Tensor, "batch time hidden"], sequence: TokenSequence
    ) -> tuple[Float[Tensor, "batch kv_heads time dim"], Float[Tensor, "batch kv_heads time dim"]]:
        """Return rotated keys and values of tokens without queries, such as mac's memory tokens."""
        kv = linear_rows(self.qkv_proj, x, self.heads * self.head_dim)
        k, v = kv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(self.kv_heads, dim=1)
        cos, sin = (angles.to(k.dtype) for angles in sequence.angles)
        return rotate(k, cos, sin), v

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, visible: Visibility
    ) -> tuple[Float[Tensor, "batch queries heads dim"], Tensor | None]:
        """Attend from `q` to [persistent, keys] through transformers' registry."""
        implementation = self.config._attn_implementation
        if implementation.startswith("flash_attention"):
            raise ValueError(
                "flash_attention_2 has no mask for mac's recalled tokens: set attn_implementation to 'sdpa' or "
                "'flex_attention'"
            )
        keys, values = self.with_persistent(keys, values)
        mask: Any
        if implementation == "flex_attention":
            rows = None if visible.query_documents is None else len(visible.query_documents)
            mask = create_block_mask(visible, rows, None, q.shape[2], keys.shape[2], device=q.device)
        elif implementation == "eager":
            mask = torch.zeros((), dtype=q.dtype, device=q.device).where(visible.dense, torch.finfo(q.dtype).min)
        else:
            mask = visible.dense
        return self._call(q, keys, values, mask)

    def _attend_in_order(
        self, q: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None, sequence: TokenSequence
    ) -> tuple[Tensor, Tensor | None]:
        """Attend without folding, to all keys in sequence order."""
        implementation = self.config._attn_implementation
        time, past = q.shape[2], keys.shape[2] - q.shape[2]
        if implementation.startswith("flash_attention"):
            return self._attend_flash(q, keys, values, documents)
        everything = documents is None and (self.window is None or keys.shape[2] <= self.window)
        if implementation == "sdpa" and everything and (time == 1 or past == 0):
            return self._attend_unmasked(q, keys, values)
        memo = ("in order", self.window, past)
        if memo not in sequence.memo:
            clock = torch.arange(keys.shape[2], device=q.device)
            query_documents = None if documents is None else documents[:, past:]
            sequence.memo[memo] = Visibility(
                clock[past:], clock, self.num_persistent, self.window, query_documents, documents
            )
        return self.attend(q, keys, values, sequence.memo[memo])

    def _attend_unmasked(self, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attend from one token to every key, or along a plain causal row; fused kernels need no mask for either."""
        keys, values = self.with_persistent(keys, values)
        front = self.num_persistent if q.shape[2] > 1 else 0
        # Persistent tokens become the first tokens of the row; their outputs are dropped.
        out, weights = self._call(F.pad(q, (0, 0, front, 0)), keys, values, None)
        return out[:, front:], weights

    def _attend_folded(
        self, q: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None, sequence: TokenSequence
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within a window, in blocks: each block of queries meets its own keys and the previous block's."""
        assert self.window is not None
        batch, _, time, _ = q.shape
        window, past = self.window, keys.shape[2] - q.shape[2]
        blocks = -(-time // window)
        front, back = window - past, blocks * window - time
        dtype, q, keys, values = q.dtype, *self._widened(q, keys, values)
        every = self._front(keys)
        keys, values = (block_pairs(x, own, window, past) for x, own in zip((keys, values), every, strict=True))
        q = F.pad(q, (0, 0, 0, back)).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)
        memo = ("folded", window, past)
        if memo not in sequence.memo:
            mask = self._fold_visibility(blocks, front, back, documents, q.device).dense
            if len(mask) == blocks != len(q):
                mask = mask.expand(batch, *mask.shape).flatten(0, 1)
            sequence.memo[memo] = mask
        with nullcontext() if q.dtype == dtype else torch.autocast(q.device.type, enabled=False):
            out, _ = self._call(q, keys, values, sequence.memo[memo])
        return out.to(dtype).unflatten(0, (batch, blocks)).flatten(1, 2)[:, :time], None

    @staticmethod
    def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
        """Return tensors in at least float32 on a CPU, whose kernel of attention is four times slower in bfloat16."""
        if tensors[0].device.type != "cpu":
            return tensors
        return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)

    def _fold_visibility(
        self, blocks: int, front: int, back: int, documents: Tensor | None, device: torch.device
    ) -> Visibility:
        assert self.window is not None
        clock = torch.arange(2 * self.window, device=device)
        visible = Visibility(clock[self.window :], clock, self.num_persistent, self.window)
        if documents is None and front == 1:
            return visible  # the one missing key lies outside every window
        if documents is None:
            length = (blocks + 1) * self.window - front - back
            documents = torch.zeros(1, length, dtype=torch.long, device=device)
        folded = F.pad(documents, (front, back), value=NOWHERE).unfold(1, 2 * self.window, self.window).flatten(0, 1)
        visible.query_documents, visible.key_documents = folded[:, self.window :], folded
        return visible

    def _attend_flash(
        self, q: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with FlashAttention, which supports causal rows, windows and padding, but no persistent tokens."""
        if self.num_persistent and self.window is not None:
            raise ValueError(
                "flash_attention_2 cannot keep persistent tokens in a sliding window: set "
                "num_persistent_tokens=0, or attn_implementation to 'sdpa' or 'flex_attention'"
            )
        if documents is not None and (documents.max() > 0 or self.num_persistent):
            raise ValueError(
                "flash_attention_2 supports only rows of one document without persistent tokens here: set "
                "attn_implementation to 'sdpa' or 'flex_attention' for packed documents"
            )
        valid = None if documents is None else documents >= 0
        beyond = self.window is not None and keys.shape[2] > self.window
        if valid is not None and beyond and splits_tokens(valid):
            raise ValueError(
                f"flash_attention_2 drops padding before it counts attention_window={self.window}, and a row has "
                "padding between its tokens: pad on the left or right, or set attn_implementation to 'sdpa' or "
                "'flex_attention'"
            )
        mask = None if valid is None else valid.long()
        keys, values = self.with_persistent(keys, values)
        return self._call(q, keys, values, mask, sliding_window=self.window)

    def _call(self, q: Tensor, keys: Tensor, values: Tensor, mask: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = function(self, q, keys, values, mask, dropout=dropout, scaling=self.scaling, **options)
        return out, weights

    @property
    def num_persistent(self) -> int:
        """Return the number of persistent tokens."""
        return 0 if self.persistent_tokens is None else len(self.persistent_tokens)

    def with_persistent(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Prepend the keys and values of the persistent tokens."""
        if self.persistent_tokens is None:
            return keys, values
        k, v = self._persistent(self.persistent_tokens, keys.dtype)
        return (
            torch.cat((k.expand(len(keys), -1, -1, -1), keys), dim=2),
            torch.cat((v.expand(len(values), -1, -1, -1), values), dim=2),
        )

    def _persistent(self, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the persistent tokens.

        Persistent tokens have no position. Their keys are zero in the rotated channels, so that a query's score
        with them does not depend on its position.
        """
        kv = linear_rows(self.qkv_proj, tokens, self.heads * self.head_dim)
        k, v = kv.unflatten(-1, (-1, self.head_dim)).transpose(0, 1).to(dtype).split(self.kv_heads)
        return F.pad(k[..., self.config.rotary_dim :], (self.config.rotary_dim, 0)), v


def _last(x: Tensor, count: int, dim: int) -> Tensor:
    """Return a copy of the end of `x`, which does not keep the rest of `x` alive."""
    return x if count == x.shape[dim] else x.narrow(dim, x.shape[dim] - count, count).clone()


def decoding_mask(
    sequence: TokenSequence,
    document_ids: Int[Tensor, "batch past"] | None,
    past: int,
    front: int,
    config: HybridMemConfig,
    like: Tensor,
) -> tuple[Int[Tensor, "batch read"] | None, Tensor | None]:
    """Return the documents of `past` kept keys and of the one token that is decoded, and its attention mask.

    The keys are all within the window; `front` tokens before them are always seen. Layers that keep the same tokens
    share both.
    """
    if document_ids is None and sequence.document_ids is None:
        return None, None
    memo = ("decoded", past, front)
    if memo not in sequence.memo:
        now = sequence.document_ids
        if now is None:
            now = torch.zeros(len(like), 1, dtype=torch.long, device=like.device)
        before = now.new_zeros(len(now), past) if document_ids is None else document_ids
        documents = torch.cat((before, now), dim=1)
        seen = F.pad(documents == now, (front, 0), value=True)[:, None, None]
        mask: Tensor | None = seen
        if known_true(seen.all()):
            mask = None
        elif config._attn_implementation == "eager":
            mask = torch.zeros((), dtype=like.dtype, device=like.device).where(seen, torch.finfo(like.dtype).min)
        sequence.memo[memo] = documents, mask
    return sequence.memo[memo]


def _documents(sequence: TokenSequence, state: AttentionState | None, x: Tensor) -> Int[Tensor, "batch read"] | None:
    """Return the documents of kept keys and tokens; None if there is only one document."""
    before, now = (None if state is None else state.document_ids), sequence.document_ids
    if state is None or (before is None and now is None):
        return now
    if before is None:
        before = torch.zeros(len(x), state.keys.shape[2], dtype=torch.long, device=x.device)
    if now is None:
        now = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    return torch.cat((before, now), dim=1)
