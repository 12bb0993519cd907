"""Memory as heads (`mah`): every KV head reads a window, sinks, and its own source for older tokens.

Softmax attention splits exactly: o_full = w · o_window + (1 - w) · o_far, where w is the window's share of the
attention mass. A `full` head attends to all tokens. A `none` head drops the far part. A `memory` head models o_far by
a neural memory of the tokens that left the window, and w by a gate.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import MASK_DECODING, Visibility, decoding_mask, eager_attention
from .configuration import HybridMemConfig
from .functional import rotate, rotate_as_pretrained
from .memory import HeadMemory, HeadMemoryState, norm_layer, pick
from .sequence import HeadChoice, TokenSequence
from .sinks import Places, Rows, WindowPlan, plan_window
from .state import KeyBuffer, PlainKeys, key_buffer

Hidden = Float[Tensor, "batch time hidden"]


class FullKeys(NamedTuple):
    """All rotated keys and values so far, and their documents (None: a single document)."""

    past: PlainKeys | KeyBuffer
    document_ids: Int[Tensor, "batch past"] | None

    @property
    def keys(self) -> Float[Tensor, "batch kv_heads past dim"]:
        """Return the keys."""
        return self.past.keys

    @property
    def values(self) -> Float[Tensor, "batch kv_heads past dim"]:
        """Return the values."""
        return self.past.values


class WindowKeys(NamedTuple):
    """Rotated keys and values of the last tokens and of the document's first tokens."""

    keys: Float[Tensor, "batch kv_heads kept dim"]
    values: Float[Tensor, "batch kv_heads kept dim"]
    sink_keys: Float[Tensor, "batch kv_heads sinks dim"]
    sink_values: Float[Tensor, "batch kv_heads sinks dim"]
    places: Places | None


class HeadsState(NamedTuple):
    """State of a `mah` layer, with one part for each source that its heads read."""

    sources: str  # the first letter of each KV head's source; a trailing + allows heads to read `full` as well
    full: FullKeys | None
    sliding: WindowKeys | None  # `full` heads of a base model with a sliding window
    local: WindowKeys | None
    memory: HeadMemoryState | None


class HeadTokens(NamedTuple):
    """Queries, keys and values of the tokens of one call."""

    raw_q: Float[Tensor, "batch heads time dim"]  # before the rotary embedding
    raw_k: Float[Tensor, "batch kv_heads time dim"]
    v: Float[Tensor, "batch kv_heads time dim"]
    q: Float[Tensor, "batch heads time dim"]
    k: Float[Tensor, "batch kv_heads time dim"]


class HeadWindow(NamedTuple):
    """Keys and values of [kept tokens, the call's tokens] and of the sinks, plus the part that the next call needs."""

    plan: WindowPlan
    keys: Float[Tensor, "batch kv_heads read dim"]
    values: Float[Tensor, "batch kv_heads read dim"]
    sink_keys: Float[Tensor, "batch kv_heads sinks dim"]
    sink_values: Float[Tensor, "batch kv_heads sinks dim"]
    kept: WindowKeys

    def heads(self, start: int, count: int) -> "HeadWindow":
        """Return the slice for `count` consecutive heads."""
        keys, values, sink_keys, sink_values = (
            x.narrow(1, start, count) for x in (self.keys, self.values, self.sink_keys, self.sink_values)
        )
        return HeadWindow(self.plan, keys, values, sink_keys, sink_values, self.kept)

    @property
    def folded(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values that each block of queries attends to."""
        return self.plan.fold_keys(self.sink_keys, self.keys), self.plan.fold_keys(self.sink_values, self.values)


class HeadGroups(NamedTuple):
    """Indices of KV heads, grouped by source."""

    full: list[int]
    none: list[int]
    memory: list[int]

    @property
    def local(self) -> list[int]:
        """Return the heads that attend within a window."""
        return self.none + self.memory


class HeadMixer(nn.Module):
    """Mixer of `mah`: attention in which each KV head has its own source.

    Args:
        config: the model's configuration.
        layer_idx: the layer's index.
    """

    def __init__(self, config: HybridMemConfig, layer_idx: int):
        super().__init__()
        assert config.head_sources is not None
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.num_key_value_groups = self.heads // self.kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.attention_dropout = config.attention_dropout
        self.sliding_window = None if config.sliding_windows is None else config.sliding_windows[layer_idx]
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=config.attention_output_bias)
        self.q_norm = norm_layer(config, self.head_dim) if config.qk_norm else None
        self.k_norm = norm_layer(config, self.head_dim) if config.qk_norm else None
        self.memory = HeadMemory(config) if "memory" in config.head_sources[layer_idx] else None

    def forward(
        self, x: Hidden, state: HeadsState | None, sequence: TokenSequence
    ) -> tuple[Hidden, HeadsState, Tensor | None]:
        """Mix tokens; return the output, the next state, and attention weights if every head is `full`.

        Raises:
            ValueError: a head reads a memory that the layer lacks, or the state was filled with other sources.
        """
        mixed, state, weights = self.mix(x, state, sequence)
        return self.o_proj(mixed.flatten(-2)), state, weights

    def mix(
        self, x: Hidden, state: HeadsState | None, sequence: TokenSequence
    ) -> tuple[Float[Tensor, "batch time heads dim"], HeadsState, Tensor | None]:
        """Run `forward` without the output projection, and return the outputs by head."""
        groups, share, code = self._choice(sequence.heads, len(x))
        state = self._checked(state, code)
        if "rows" not in sequence.memo:
            sequence.memo["rows"] = Rows(sequence)
        rows = sequence.memo["rows"]
        tokens = self.project(x, sequence)
        aligned = tokens if rows.order is None else HeadTokens(*(rows.align(y, 2) for y in tokens))
        outputs: dict[str, Tensor] = {}
        weights = None
        if groups.full and self.sliding_window is not None:
            window = self._window(aligned, groups.full, self.sliding_window, 0, state.sliding, rows, sequence)
            outputs["full"] = rows.restore(self._attend_window(self._queries(aligned.q, groups.full), window))
            state = state._replace(sliding=window.kept)
        elif groups.full:
            outputs["full"], weights, state = self._attend_full(tokens, groups.full, state, sequence)
        if groups.local and not groups.memory and sequence.heads is not None and sequence.heads.all_full:
            window = self._window(
                aligned,
                groups.none,
                self.config.attention_window,
                self.config.num_sink_tokens,
                state.local,
                rows,
                sequence,
            )
            return outputs["full"], state._replace(local=window.kept), None
        if groups.local:
            local, state = self._attend_local(rows.align(x), aligned, groups, state, rows, sequence)
            outputs["local"] = rows.restore(local)
        if share is not None and groups.local:
            outputs = self._blend(outputs, groups, share)
            groups = groups._replace(full=[head for head in groups.full if head not in groups.local])
        return self._join(outputs, groups), state, None if groups.local else weights

    def project(self, x: Hidden, sequence: TokenSequence) -> HeadTokens:
        """Return queries, keys and values, before and after the rotary embedding."""
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if not self.config.is_pretrained:
            cos, sin = (y.to(q.dtype) for y in sequence.angles)
            return HeadTokens(q, k, v, rotate(q, cos, sin), rotate(k, cos, sin))
        memo = ("both channels", q.dtype)
        if memo not in sequence.memo:
            sequence.memo[memo] = [torch.cat((y, y), dim=-1).to(q.dtype) for y in sequence.angles]
        cos, sin = sequence.memo[memo]
        return HeadTokens(q, k, v, rotate_as_pretrained(q, cos, sin), rotate_as_pretrained(k, cos, sin))

    def sources_code(self, sequence: TokenSequence) -> str:
        """Return the first letter of each KV head's source, and + where heads may also read `full`."""
        return self._choice(sequence.heads)[2]

    def _choice(
        self, choice: HeadChoice | None, batch: int | None = None
    ) -> tuple[HeadGroups, Float[Tensor, "rows kv_heads *time"] | None, str]:
        """Return the heads of each source, the share of `full` in each head, and the code of the state's layout."""
        layers = None if choice is None else choice.sources
        if layers is None:
            assert self.config.head_sources is not None
            layers = self.config.head_sources
        sources = layers[self.layer_idx]
        share = None if choice is None or choice.full_share is None else choice.full_share[:, self.layer_idx]
        if share is not None and batch is not None and len(share) not in (1, batch):
            raise ValueError(f"full_share has {len(share)} rows for a batch of {batch}: give 1 or {batch} rows")
        full, none, memory = (
            [n for n, name in enumerate(sources) if name == kind] for kind in ("full", "none", "memory")
        )
        if memory and self.memory is None:
            raise ValueError(
                f"head_sources[{self.layer_idx}] names memory but the layer was built without one: load the model with "
                "memory in head_sources for this layer, or convert with head_source='memory'"
            )
        code = "".join(name[0] for name in sources) + ("" if share is None else "+")
        return HeadGroups(full if share is None else list(range(self.kv_heads)), none, memory), share, code

    def _checked(self, state: HeadsState | None, code: str) -> HeadsState:
        if state is None:
            return HeadsState(code, None, None, None, None)
        if state.sources != code:
            raise ValueError(
                f"layer {self.layer_idx}: the cache was filled with head sources {state.sources!r} but is read with "
                f"{code!r}: start with an empty cache after changing head sources"
            )
        return state

    def _attend_full(
        self, tokens: HeadTokens, heads: list[int], state: HeadsState, sequence: TokenSequence
    ) -> tuple[Tensor, Tensor | None, HeadsState]:
        """Attend to every key."""
        q, documents = self._queries(tokens.q, heads), sequence.document_ids
        keys, values = pick(tokens.k, heads), pick(tokens.v, heads)
        implementation = self.config._attn_implementation
        if sequence.decodes and state.full is not None and implementation in MASK_DECODING:
            return self._decode_full(q, keys, values, state, state.full, sequence)
        if state.full is None and len(heads) < self.kv_heads:  # a view would keep the keys of other heads alive
            keys, values = keys.clone(), values.clone()
        if state.full is not None:
            before = state.full
            if documents is not None:
                earlier = before.document_ids
                if earlier is None:  # earlier calls passed no document ids: their tokens belong to document 0
                    earlier = documents.new_zeros(len(documents), before.keys.shape[2])
                documents = torch.cat((earlier, documents), dim=1)
            keys = torch.cat((before.keys.to(keys.dtype), keys), dim=2)
            values = torch.cat((before.values.to(values.dtype), values), dim=2)
        mask = self._full_mask(q, keys, documents, sequence)
        out, weights = self._call(implementation, q, keys, values, mask)
        return out, weights, state._replace(full=FullKeys(PlainKeys(keys, values), documents))

    def _decode_full(
        self, q: Tensor, k: Tensor, v: Tensor, state: HeadsState, before: FullKeys, sequence: TokenSequence
    ) -> tuple[Tensor, Tensor | None, HeadsState]:
        """Attend from one token to every key in a buffer, which takes its own."""
        past = before.past
        if isinstance(past, PlainKeys):
            front = k.new_empty(len(k), 2, k.shape[1], 0, self.head_dim)
            past = key_buffer(past.keys.to(k.dtype), past.values.to(v.dtype), front)
        buffer = past.followed_by(k, v)
        documents, mask = decoding_mask(sequence, before.document_ids, buffer.stop - 1, 0, self.config, q)
        out, weights = self._call(self.config._attn_implementation, q, buffer.keys, buffer.values, mask)
        return out, weights, state._replace(full=FullKeys(buffer, documents))

    def _full_mask(self, q: Tensor, keys: Tensor, documents: Tensor | None, sequence: TokenSequence) -> Any:
        """Return the attention mask for causal rows of documents, or None for plain causal rows."""
        implementation, past = self.config._attn_implementation, keys.shape[2] - q.shape[2]
        if implementation.startswith("flash_attention"):
            if documents is not None and documents.max() > 0:
                raise ValueError(
                    "flash_attention_2 supports only rows of one document: set attn_implementation to 'sdpa' or "
                    "'flex_attention' for packed documents"
                )
            return None if documents is None else (documents >= 0).long()
        if implementation == "sdpa" and documents is None and (q.shape[2] == 1 or past == 0):
            return None
        memo = ("all keys", implementation, past)
        if memo not in sequence.memo:
            clock = torch.arange(keys.shape[2], device=q.device)
            queried = None if documents is None else documents[:, past:]
            visible = Visibility(clock[past:], clock, 0, None, queried, documents)
            if implementation == "flex_attention":
                sequence.memo[memo] = create_block_mask(
                    visible, None if documents is None else len(q), None, q.shape[2], keys.shape[2], device=q.device
                )
            else:
                sequence.memo[memo] = _mask_for(implementation, visible.dense, q)
        return sequence.memo[memo]

    def _attend_local(
        self, x: Hidden, tokens: HeadTokens, groups: HeadGroups, state: HeadsState, rows: Rows, sequence: TokenSequence
    ) -> tuple[Tensor, HeadsState]:
        """Attend to window and sinks, and read the memory for heads with source `memory`."""
        config, none = self.config, len(groups.none)
        window = self._window(
            tokens, groups.local, config.attention_window, config.num_sink_tokens, state.local, rows, sequence
        )
        state = state._replace(local=window.kept)
        outputs = []
        if groups.none:
            outputs.append(self._attend_window(self._queries(tokens.q, groups.none), window.heads(0, none)))
        if groups.memory:
            assert self.memory is not None
            own = window.heads(none, len(groups.memory))
            attended, mass = self._attend_with_mass(self._queries(tokens.q, groups.memory), own)
            keys = pick(tokens.raw_k, groups.memory)
            if state.memory is not None:
                keys = torch.cat((state.memory.keys.to(keys.dtype), keys), dim=2)
            queries = self._queries(tokens.raw_q, groups.memory)
            writes = None if sequence.writes is None else rows.align(sequence.writes)
            mixed, memory = self.memory(
                x, queries, keys, own.values, attended, mass, groups.memory, own.plan, state.memory, writes
            )
            state = state._replace(memory=memory)
            outputs.append(mixed)
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0], state

    def _window(
        self,
        tokens: HeadTokens,
        heads: list[int],
        window: int,
        sinks: int,
        before: WindowKeys | None,
        rows: Rows,
        sequence: TokenSequence,
    ) -> HeadWindow:
        """Append the keys and values of `heads` to the ones kept by earlier calls."""
        k, v = pick(tokens.k, heads), pick(tokens.v, heads)
        places = None if before is None else before.places
        plan = plan_window(sequence, rows, k.shape[2], window, sinks, places, k.device)
        sink_keys, sink_values = (y[:, :, :0] for y in (k, v))
        if before is not None:
            sink_keys, sink_values = before.sink_keys.to(k.dtype), before.sink_values.to(v.dtype)
            k, v = torch.cat((before.keys.to(k.dtype), k), dim=2), torch.cat((before.values.to(v.dtype), v), dim=2)
        kept = WindowKeys(
            plan.keep(k), plan.keep(v), plan.keep_sinks(sink_keys, k), plan.keep_sinks(sink_values, v), plan.places
        )
        return HeadWindow(plan, k, v, sink_keys, sink_values, kept)

    def _attend_window(self, q: Tensor, window: HeadWindow) -> Float[Tensor, "batch time heads dim"]:
        """Attend in blocks through transformers' registry."""
        plan, implementation = window.plan, self.config._attn_implementation
        if implementation.startswith("flash_attention"):
            implementation = "sdpa"  # FlashAttention has no mask for sinks
        folded, keys, values = plan.fold_queries(q), *window.folded
        mask = None
        if plan.needs_mask or (implementation != "sdpa" and plan.time > 1):
            if implementation not in plan.masks:
                plan.masks[implementation] = _mask_for(implementation, plan.mask(len(q)), folded)
            mask = plan.masks[implementation]
        out, _ = self._call(implementation, folded, keys, values, mask)
        return plan.unfold(out)

    def _attend_with_mass(
        self, q: Tensor, window: HeadWindow
    ) -> tuple[Float[Tensor, "batch time heads dim"], Float[Tensor, "batch time heads"]]:
        """Attend in blocks; return the output and the log-sum-exp of each query's scores."""
        plan = window.plan
        folded, keys, values = plan.fold_queries(q), *window.folded
        grouped = folded.unflatten(1, (keys.shape[1], -1))  # queries that share a key are grouped, not keys repeated
        scores = (grouped.flatten(2, 3) @ keys.mT).unflatten(2, grouped.shape[2:4]) * self.scaling
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if plan.needs_mask or plan.time > 1:
            scores = scores.masked_fill(~plan.mask(len(q)).unsqueeze(1), -torch.inf)
        mass = scores.logsumexp(-1)
        weights = (scores - mass.unsqueeze(-1)).exp().to(values.dtype)
        weights = F.dropout(weights, self.attention_dropout, self.training)
        out = (weights.flatten(2, 3) @ values).unflatten(2, grouped.shape[2:4]).flatten(1, 2)
        return plan.unfold(out.transpose(1, 2)), plan.unfold(mass.flatten(1, 2).transpose(1, 2))

    def _call(
        self, implementation: str, q: Tensor, keys: Tensor, values: Tensor, mask: Any
    ) -> tuple[Float[Tensor, "batch queries heads dim"], Tensor | None]:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        if implementation == "sdpa" and q.shape[2] == 1 and q.shape[1] > keys.shape[1]:
            # The heads that share a key are its queries: torch's grouped kernel takes five times as long for one token.
            grouped = q.flatten(1, 2).unflatten(1, (keys.shape[1], -1))
            out = F.scaled_dot_product_attention(grouped, keys, values, mask, dropout, scale=self.scaling)
            return out.flatten(1, 2).unsqueeze(1), None
        out, weights = function(self, q, keys, values, mask, dropout=dropout, scaling=self.scaling)
        return out, weights

    def _queries(self, q: Float[Tensor, "batch heads time dim"], heads: list[int]) -> Tensor:
        """Select the queries that belong to the given KV heads."""
        return pick(q.unflatten(1, (self.kv_heads, -1)), heads).flatten(1, 2)

    def _blend(
        self, outputs: dict[str, Tensor], groups: HeadGroups, share: Float[Tensor, "rows kv_heads *time"]
    ) -> dict[str, Tensor]:
        """Mix `full` with each local head's own source; leave heads without another source unchanged."""
        full = outputs["full"].unflatten(2, (self.kv_heads, -1))
        local = outputs["local"].unflatten(2, (len(groups.local), -1))
        weight = pick(share, groups.local)
        weight = (weight[:, None] if weight.dim() == 2 else weight.mT)[..., None, None].to(local.dtype)
        blended = torch.lerp(local, pick(full, groups.local, 2), weight).flatten(2, 3)
        alone = [head for head in groups.full if head not in groups.local]
        return {"full": pick(full, alone, 2).flatten(2, 3), "local": blended} if alone else {"local": blended}

    def _join(self, outputs: dict[str, Tensor], groups: HeadGroups) -> Float[Tensor, "batch time heads dim"]:
        """Concatenate the outputs of all sources in the order of the heads."""
        if len(outputs) == 1 and not (groups.none and groups.memory):
            return next(iter(outputs.values()))
        order = [*groups.full, *groups.local]
        joined = torch.cat(list(outputs.values()), dim=2).unflatten(2, (self.kv_heads, -1))
        return pick(joined, sorted(range(self.kv_heads), key=order.__getitem__), 2).flatten(2, 3)


def _mask_for(implementation: str, seen: Bool[Tensor, "rows 1 queries keys"], q: Tensor) -> Any:
    """Convert a mask to the format of an attention implementation."""
    if implementation == "eager":
        return torch.zeros((), dtype=q.dtype, device=q.device).where(seen, torch.finfo(q.dtype).min)
    if implementation == "flex_attention":
        rows = len(seen)
        return create_block_mask(
            lambda row, _, query, key: seen[row if rows > 1 else 0, 0, query, key],  # flex inspects the signature
            rows if rows > 1 else None,
            None,
            seen.shape[2],
            seen.shape[3],
            device=q.device,
        )
    return seen
