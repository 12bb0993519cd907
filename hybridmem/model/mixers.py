"""Token mixers, one class per variant (Titans, arXiv 2501.00663, section 4)."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybridmem_kernels import MemoryMLPState, MemoryState
from hybridmem_kernels.blocks import even_blocks, split_blocks

from .attention import AttentionState, ShortRangeAttention, Visibility
from .configuration import HybridMemConfig
from .convolution import ConvolutionState
from .memory import NeuralMemory, NeuralMemoryState, RMSNorm
from .sequence import NOWHERE, TokenSequence, known_true
from .state import KeyBuffer, key_buffer, map_state, select_rows

Hidden = Float[Tensor, "batch time hidden"]


class AttentionMixer(nn.Module):
    """Mixer of `swa` and `full`: attention alone."""

    def __init__(self, config: HybridMemConfig, layer_idx: int):
        super().__init__()
        window = config.attention_window if config.layer_type(layer_idx) == "swa" else None
        self.attention = ShortRangeAttention(config, layer_idx, window)

    def forward(
        self, x: Hidden, state: AttentionState | None, sequence: TokenSequence
    ) -> tuple[Hidden, AttentionState, Tensor | None]:
        """Mix tokens; return the output, the next state, and the attention weights if available."""
        return self.attention(x, state, sequence)


class MemoryMixer(nn.Module):
    """Mixer of `lmm`: the memory alone."""

    def __init__(self, config: HybridMemConfig, layer_idx: int):
        super().__init__()
        self.memory = NeuralMemory(config)

    def forward(
        self, x: Hidden, state: NeuralMemoryState | None, sequence: TokenSequence
    ) -> tuple[Hidden, NeuralMemoryState, None]:
        """Mix tokens; return the output, the next state and None."""
        return *self.memory(x, state, sequence), None


class BranchStates(NamedTuple):
    """States of a layer with attention and memory."""

    attention: AttentionState
    memory: NeuralMemoryState


class GateMixer(nn.Module):
    """Mixer of `mag`: window attention and memory on the same input, g ⊙ attention + (1 - g) ⊙ memory.

    Both outputs are first normalised with learned vectors, so that the gate g, one number per head and token, is the
    allocation between them.
    """

    def __init__(self, config: HybridMemConfig, layer_idx: int):
        super().__init__()
        self.attention = ShortRangeAttention(config, layer_idx, config.attention_window)
        self.memory = NeuralMemory(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.memory_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.allocation_gate = nn.Linear(config.hidden_size, config.num_attention_heads)

    def forward(
        self, x: Hidden, state: BranchStates | None, sequence: TokenSequence
    ) -> tuple[Hidden, BranchStates, Tensor | None]:
        """Mix tokens; return the output, the next state, and the attention weights if available."""
        attended, attention, weights = self.attention(x, None if state is None else state.attention, sequence)
        remembered, memory = self.memory(x, None if state is None else state.memory, sequence)
        attended, remembered = self.attention_norm(attended), self.memory_norm(remembered)
        gate = torch.sigmoid(self.allocation_gate(x)).unsqueeze(-1)
        attended, remembered = (y.unflatten(-1, (gate.shape[-2], -1)) for y in (attended, remembered))
        mixed = torch.lerp(remembered, attended, gate.to(attended.dtype)).flatten(-2)
        return mixed, BranchStates(attention, memory), weights


class LayerMixer(nn.Module):
    """Mixer of `mal`: the memory first, then window attention on the memory's output."""

    def __init__(self, config: HybridMemConfig, layer_idx: int):
        super().__init__()
        self.memory = NeuralMemory(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = ShortRangeAttention(config, layer_idx, config.attention_window)

    def forward(
        self, x: Hidden, state: BranchStates | None, sequence: TokenSequence
    ) -> tuple[Hidden, BranchStates, Tensor | None]:
        """Mix tokens; return the output, the next state, and the attention weights if available."""
        remembered, memory = self.memory(x, None if state is None else state.memory, sequence)
        past = None if state is None else state.attention
        attended, attention, weights = self.attention(self.norm(x + remembered), past, sequence)
        return remembered + attended, BranchStates(attention, memory), weights


class OpenSegment(NamedTuple):
    """Keys and values of the open segment, one column per token, for memory and attention."""

    memory_keys: Float[Tensor, "batch kv_heads columns dim"]
    memory_values: Float[Tensor, "batch kv_heads columns dim"]
    keys: Float[Tensor, "batch kv_heads columns dim"]
    values: Float[Tensor, "batch kv_heads columns dim"]
    valid: Bool[Tensor, "batch columns"]  # False for columns before the row's segment began

    def without(self, rows: Bool[Tensor, " batch"]) -> "OpenSegment":
        """Empty the segments of `rows`, and drop columns that are then empty in every row."""
        valid = self.valid & ~rows[:, None]
        alive = valid.any(0)
        keys, values = self.keys[:, :, alive], self.values[:, :, alive]
        return OpenSegment(
            self.memory_keys[:, :, alive], self.memory_values[:, :, alive], keys, values, valid[:, alive]
        )

    def followed_by(self, new: "OpenSegment") -> "OpenSegment":
        """Append new columns."""
        return OpenSegment(
            torch.cat((self.memory_keys, new.memory_keys), dim=2),
            torch.cat((self.memory_values, new.memory_values), dim=2),
            torch.cat((self.keys, new.keys), dim=2),
            torch.cat((self.values, new.values), dim=2),
            torch.cat((self.valid, new.valid), dim=1),
        )


class SegmentBuffer(NamedTuple):
    """The open segment of rows that are decoded alike: a buffer in which each token's two columns are neighbours."""

    columns: KeyBuffer

    def open(self) -> OpenSegment:
        """Return the segment column by column."""
        keys, values = self.columns.keys, self.columns.values
        valid = torch.ones(len(keys), keys.shape[2] // 2, dtype=torch.bool, device=keys.device)
        return OpenSegment(keys[:, :, ::2], values[:, :, ::2], keys[:, :, 1::2], values[:, :, 1::2], valid)


class SegmentStates(NamedTuple):
    """State of a mac layer."""

    segment: OpenSegment | SegmentBuffer
    filled: Int[Tensor, " batch"]  # number of tokens in the open segment; 0: the next token opens a segment
    segment_memory: MemoryState | MemoryMLPState  # the memory's state before the open segment
    memory: NeuralMemoryState
    attention_convolution: ConvolutionState | None
    query_convolution: ConvolutionState | None


class ContextMixer(nn.Module):
    """Mixer of `mac`: in each segment, attention over [persistent, recalled, segment] tokens, then a memory write.

    For token i of a segment, h_i = M(q_i) is read from the memory's state before the segment; a_i attends to h_j and
    x_j, j <= i; y_i = norm(x_i + a_i) is written to the memory; the output is a_i + (1 + y_i) ⊙ M_i(y_i), read after
    that write. The paper has only the product. Both residuals are necessary: without the one around attention, the
    initial writes and queries are unrelated; without the one around the product, recalled values have random signs.
    Key-value recall that takes 100 steps with the residuals is not learnt in 800 without them.
    """

    def __init__(self, config: HybridMemConfig, layer_idx: int):
        super().__init__()
        assert config.segment_length is not None
        self.segment_length = config.segment_length
        self.attention = ShortRangeAttention(config, layer_idx, window=None)
        self.memory = NeuralMemory(config)
        self.recalled_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.written_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Hidden, state: SegmentStates | None, sequence: TokenSequence
    ) -> tuple[Hidden, SegmentStates, Tensor | None]:
        """Mix tokens; return the output, the next state, and the attention weights if available.

        Columns of the weights are [persistent tokens, recalled tokens, tokens]; the latter two begin with the columns
        of the segment left open by earlier calls.
        """
        if sequence.decodes and state is not None and self._decodes_alike(state):
            return *self._decode(x, state, sequence), None
        begun = None if state is None else state.filled
        state = self._initial(x) if state is None else state
        if isinstance(state.segment, SegmentBuffer):
            state = state._replace(segment=state.segment.open())
        if sequence.fresh_rows is not None:
            begun = None if begun is None else begun.where(~sequence.fresh_rows, 0)
        q, k, v, attention_convolution = self.attention.project(x, state.attention_convolution, sequence)
        queries, query_convolution = self.memory.queries(x, state.query_convolution, sequence)
        segments = _Segments(x, self.segment_length, begun, sequence)
        outputs: list[Tensor] = []
        weights: list[Tensor | None] = []
        tokens = segments.cut(x, q, k, v, queries, *sequence.angles)
        for n, (x_n, q_n, k_n, v_n, queries_n, cos, sin) in enumerate(tokens):
            part = segments.part(n, cos, sin)
            memory = state.memory
            if part.fresh_rows is not None:
                memory = self.memory.reset(memory, part.fresh_rows)
            recalled_from, old = memory.scan, None
            if not segments.begin_alike(n):
                recalled_from, old = self._gone_on_with(segments, n, recalled_from, state)
            recalled = self.recalled_norm(self.memory.read(x_n, queries_n, recalled_from))
            new = OpenSegment(*self.attention.keys_and_values(recalled, part), k_n, v_n, segments.valid(n))
            open_segment, attended, weights_n = self._attend(q_n, new, old)
            written = self.written_norm(x_n + attended)
            remembered, memory = self.memory(written, memory, part)
            outputs.append(attended + (1 + written) * remembered)
            weights.append(weights_n)
            state = state._replace(segment=open_segment, segment_memory=recalled_from, memory=memory)
        state = state._replace(
            filled=segments.filled,
            attention_convolution=attention_convolution,
            query_convolution=query_convolution,
        )
        mixed = segments.join(outputs) if outputs else torch.zeros_like(x)  # every token is padding
        return mixed, state, self._join_weights(segments, weights)

    def _decodes_alike(self, state: SegmentStates) -> bool:
        """Return whether all rows are at the same token of their segment, and only plain sdpa sees their columns."""
        whole = isinstance(state.segment, SegmentBuffer) or known_true(state.segment.valid.all())
        alike = whole and known_true((state.filled == state.filled[0]).all())
        # A function in the place of sdpa, such as a recorder, expects [persistent, recalled, tokens].
        plain = ALL_ATTENTION_FUNCTIONS.get("sdpa") is sdpa_attention_forward
        return alike and plain and self.attention.config._attn_implementation == "sdpa"

    def _decode(self, x: Hidden, state: SegmentStates, sequence: TokenSequence) -> tuple[Hidden, SegmentStates]:
        """Mix one token, the same one of its segment in every row."""
        attention, begins = self.attention, not state.filled[0]
        q, k, v, attention_convolution = attention.project(x, state.attention_convolution, sequence)
        queries, query_convolution = self.memory.queries(x, state.query_convolution, sequence)
        recalled_from = state.memory.scan if begins else state.segment_memory
        recalled = self.recalled_norm(self.memory.read(x, queries, recalled_from))
        recalled_k, recalled_v = attention.keys_and_values(recalled, sequence)
        columns = self._columns(state.segment, k, begins).followed_by(
            torch.cat((recalled_k, k), dim=2), torch.cat((recalled_v, v), dim=2)
        )
        attended = attention.attend_seen(q, columns)
        written = self.written_norm(x + attended)
        memory = state.memory
        if begins:  # the segment's tokens recall from the memory as it is now, which their writes leave alone
            memory = memory._replace(scan=map_state(torch.clone, memory.scan))
        remembered, memory = self.memory(written, memory, TokenSequence(decodes=True))
        mixed = attended + (1 + written) * remembered
        filled = (state.filled + 1) % self.segment_length
        return mixed, SegmentStates(
            SegmentBuffer(columns), filled, recalled_from, memory, attention_convolution, query_convolution
        )

    def _columns(self, segment: OpenSegment | SegmentBuffer, k: Tensor, begins: bool) -> KeyBuffer:
        """Return the open segment's columns in a buffer that takes further ones."""
        if begins:
            nothing = k[:, :, :0]
            front = self.attention.front(k)
            return key_buffer(nothing, nothing, front, min(2 * self.segment_length, 128))
        if isinstance(segment, SegmentBuffer):
            return segment.columns
        keys, values = (
            torch.stack(pair, dim=3).flatten(2, 3).to(k.dtype)
            for pair in ((segment.memory_keys, segment.keys), (segment.memory_values, segment.values))
        )
        return key_buffer(keys, values, self.attention.front(k))

    def _gone_on_with(
        self, segments: "_Segments", n: int, scan: MemoryState | MemoryMLPState, state: SegmentStates
    ) -> tuple[MemoryState | MemoryMLPState, OpenSegment]:
        """Return the memory's state before the n-th segment, and the columns of that segment read so far."""
        assert isinstance(state.segment, OpenSegment)
        if segments.alike:
            return state.segment_memory, state.segment
        begins = segments.begins(n)
        return select_rows(begins, scan, state.segment_memory), state.segment.without(begins)

    def _attend(
        self, q: Tensor, new: OpenSegment, old: OpenSegment | None
    ) -> tuple[OpenSegment, Hidden, Tensor | None]:
        """Attend within a segment; return its columns so far, the output, and the weights.

        Without `old`, all columns are valid.
        """
        columns = new if old is None else old.followed_by(new)
        past, time = columns.valid.shape[1] - q.shape[2], q.shape[2]
        clock = torch.arange(-past, time, device=q.device)
        visible = Visibility(clock[past:], clock.repeat(2), self.attention.num_persistent)
        if old is not None and not columns.valid.all():
            documents = torch.where(columns.valid, 0, NOWHERE)
            visible.query_documents, visible.key_documents = documents[:, past:], documents.repeat(1, 2)
        keys = torch.cat((columns.memory_keys, columns.keys), dim=2)
        values = torch.cat((columns.memory_values, columns.values), dim=2)
        out, weights = self.attention.attend(q, keys, values, visible)
        return columns, self.attention.o_proj(out.flatten(-2)), weights

    def _join_weights(self, segments: "_Segments", maps: list[Tensor | None]) -> Tensor | None:
        """Merge the segments' attention weights into one map over [persistent, recalled, tokens]."""
        weights = [w for w in maps if w is not None]
        if not weights:
            return None
        persistent = self.attention.num_persistent
        past = (weights[0].shape[3] - persistent) // 2 - weights[0].shape[2]
        width = past + segments.time
        nowhere = persistent + 2 * width  # an extra column that is cut off at the end
        rows = []
        for n, of_segment in enumerate(weights):
            places = segments.places(n, (of_segment.shape[3] - persistent) // 2, past)
            front = torch.arange(persistent, device=places.device).expand(len(places), -1)
            parts = ((persistent + part * width + places).where(places >= 0, nowhere) for part in range(2))
            target = torch.cat((front, *parts), dim=1)[:, None, None].expand_as(of_segment)
            joined = of_segment.new_zeros(*of_segment.shape[:3], nowhere + 1).scatter(3, target, of_segment)
            rows.append(joined[..., :nowhere].transpose(1, 2))
        joined = segments.join(rows).transpose(1, 2)
        mask = segments.sequence.mask
        return joined if mask is None else joined * mask[:, None, :, None]

    def _initial(self, x: Hidden) -> SegmentStates:
        batch, attention = len(x), self.attention
        nothing = x.new_zeros(batch, attention.kv_heads, 0, attention.head_dim)
        segment = OpenSegment(nothing, nothing, nothing, nothing, x.new_zeros(batch, 0, dtype=torch.bool))
        scan = self.memory.initial_scan_state(batch, x)
        filled = torch.zeros(batch, dtype=torch.long, device=x.device)
        return SegmentStates(segment, filled, scan, NeuralMemoryState(scan, None), None, None)


class _Segments:
    """Tokens of a call cut into segments; each document's segments begin as if the document were read alone."""

    def __init__(self, x: Hidden, length: int, filled: Int[Tensor, " batch"] | None, sequence: TokenSequence):
        batch, time, _ = x.shape
        self.sequence = sequence
        one_document = sequence.document_ids is None and sequence.mask is None
        # All rows are cut alike and have equally long open segments, so no lookup is needed.
        self.alike = one_document and (filled is None or known_true((filled == filled[0]).all()))
        if self.alike:
            self.open = 0 if filled is None else int(filled[0])
            self.blocks = even_blocks(batch, time, length, x.device, self.open)
            bounds = [0, *range(length - self.open, time, length), time]
            self.sizes = [end - start for start, end in pairwise(bounds)]
        else:
            filled = torch.zeros(batch, dtype=torch.long, device=x.device) if filled is None else filled
            self.blocks = split_blocks(time, length, filled, sequence.document_ids, sequence.mask)
        self.ragged = not self.alike and not bool(self.blocks.valid.all())
        self.time, self.filled = time, self.blocks.filled

    def cut(self, x: Hidden, *others: Tensor) -> Any:
        """Yield the tensors of each segment; `others` have time in their third axis."""
        if self.alike:
            return zip(x.split(self.sizes, dim=1), *(y.split(self.sizes, dim=2) for y in others), strict=True)
        others = tuple(y.expand(len(x), *y.shape[1:]) for y in others)
        cut = [self.blocks.gather(y) for y in (x.unsqueeze(1), *others)]
        return zip(cut[0].squeeze(2), *cut[1:], strict=True)

    def join(self, outputs: list[Tensor]) -> Tensor:
        """Undo `cut` for tensors with time in their second axis."""
        if self.alike:
            return torch.cat(outputs, dim=1)
        return self.blocks.scatter(torch.stack(outputs).unsqueeze(2)).squeeze(1)

    def part(self, n: int, cos: Tensor, sin: Tensor) -> TokenSequence:
        """Return the token sequence of the n-th segment."""
        if self.alike:
            return TokenSequence(cos, sin)
        fresh = self.blocks.new_document[:, n]
        if n == 0 and self.sequence.fresh_rows is not None:
            fresh = fresh | self.sequence.fresh_rows
        mask = self.valid(n) if self.ragged else None
        return TokenSequence(cos, sin, mask=mask, fresh_rows=fresh if fresh.any() else None)

    def valid(self, n: int) -> Bool[Tensor, "batch width"]:
        """Mark the places of the n-th segment that hold a token."""
        valid = self.blocks.valid[:, n]
        return valid[:, : self.sizes[n]] if self.alike else valid

    def places(self, n: int, columns: int, past: int) -> Int[Tensor, "batch columns"]:
        """Map each column of the n-th segment to its index in [earlier calls' columns, tokens]; -1: none."""
        valid = self.valid(n)
        new = (past + self.blocks.times[:, n, : valid.shape[1]]).where(valid, -1)
        old = (
            torch.arange(columns - valid.shape[1], device=new.device)
            if n == 0
            else new.new_full((columns - valid.shape[1],), -1)
        )
        return torch.cat((old.expand(len(new), -1), new), dim=1)

    def begin_alike(self, n: int) -> bool:
        """Return True if the n-th segment is known, without reading data, to begin in this call in every row."""
        return self.alike and (n > 0 or not self.open)

    def begins(self, n: int) -> Bool[Tensor, " batch"]:
        """Mark the rows whose n-th segment begins in this call."""
        return self.blocks.begins[:, n]
