"""What chosen layers of a model attend to and remember, kept while it runs; on any causal LM of transformers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybridmem.model.attention import AttentionState, ShortRangeAttention
from hybridmem.model.heads import FullKeys, HeadMixer, HeadsState
from hybridmem.model.memory import NeuralMemory, NeuralMemoryState, ScanInputs
from hybridmem.model.mixers import ContextMixer, GateMixer
from hybridmem.model.modeling import HybridMemLayer
from hybridmem.model.sequence import TokenSequence
from hybridmem_kernels import AttentionStats, attention_divergence

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
UNSUPPORTED = ("softcap", "s_aux")  # a softmax of q·k alone cannot say what these do


@dataclass
class AttentionRecord:
    """Queries and keys of an attention layer, after the rotary embedding, and who sees whom.

    Keys stand in the order [persistent tokens, others]; queries are those of the last tokens.
    """

    q: Float[Tensor, "batch heads queries dim"]
    k: Float[Tensor, "batch kv_heads keys dim"]
    scale: float
    window: int | None = None
    num_persistent: int = 0
    key_mask: Bool[Tensor, "batch tokens"] | None = None  # False for padding

    def map(self, function: Callable[[Tensor], Tensor]) -> "AttentionRecord":
        """Apply a function to the tensors."""
        key_mask = None if self.key_mask is None else function(self.key_mask)
        return replace(self, q=function(self.q), k=function(self.k), key_mask=key_mask)

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys are here."""
        return self.k.shape[2] - self.num_persistent

    def over_tokens(self, count: int) -> "AttentionRecord":
        """The same with keys of the last `count` tokens, among which are all that the queries see.

        Where a window's cache kept fewer, empty ones stand before them, beyond the window.
        """
        missing = count - self.num_tokens
        if not missing:
            return self
        persistent, others = self.k[:, :, : self.num_persistent], self.k[:, :, self.num_persistent :]
        k = torch.cat((persistent, torch.nn.functional.pad(others, (0, 0, missing, 0))), dim=2)
        key_mask = None if self.key_mask is None else torch.nn.functional.pad(self.key_mask, (missing, 0), value=True)
        return replace(self, k=k, key_mask=key_mask)

    def last_queries(self, length: int, shift: int = 0) -> "AttentionRecord":
        """The queries of the last `length` tokens, or of as many `shift` tokens earlier, and what they can see."""
        if not shift:
            return replace(self, q=self.q[:, :, -length:])
        key_mask = None if self.key_mask is None else self.key_mask[:, :-shift]
        return replace(self, q=self.q[:, :, -length - shift : -shift], k=self.k[:, :, :-shift], key_mask=key_mask)

    def compare(
        self, reference: "AttentionRecord", query_mask: Bool[Tensor, "batch queries"], divergence: str = "jsd"
    ) -> AttentionStats:
        """How far this attention is from another one over the same tokens, query by query."""
        longer = max(self, reference, key=lambda side: side.num_tokens)
        k, k_ref = (side.over_tokens(longer.num_tokens).k for side in (self, reference))
        return attention_divergence(
            self.q, k, reference.q, k_ref,
            scale=self.scale, scale_ref=reference.scale, window=self.window, window_ref=reference.window,
            num_persistent=self.num_persistent, num_persistent_ref=reference.num_persistent,
            query_mask=query_mask, key_mask=longer.key_mask, divergence=divergence,
        )  # fmt: skip


@dataclass
class LayerRecord:
    """What one layer did with the tokens; None, or nothing, for what its variant has not."""

    variant: str
    attention: AttentionRecord | None = None
    segments: list[AttentionRecord] = field(default_factory=list)  # mac's: keys [persistent, recalled, segment]
    gate: Float[Tensor, "batch time heads"] | None = None  # mag's: the share of attention
    memory: ScanInputs | None = None
    memory_depth: int = 1

    def detach(self) -> "LayerRecord":
        """The same without a graph."""
        return self._map(Tensor.detach)

    def select(self, rows: Int[Tensor, " rows"]) -> "LayerRecord":
        """Some of the rows."""
        return self._map(lambda x: x[rows])

    def _map(self, function: Callable[[Tensor], Tensor]) -> "LayerRecord":
        return replace(
            self,
            attention=None if self.attention is None else self.attention.map(function),
            segments=[segment.map(function) for segment in self.segments],
            gate=None if self.gate is None else function(self.gate),
            memory=None if self.memory is None else ScanInputs(*map(function, self.memory)),
        )


class Records(dict[int, LayerRecord]):
    """The records of one pass, by layer."""

    def detach(self) -> "Records":
        """Return the records without a graph."""
        return Records({number: record.detach() for number, record in self.items()})

    def select(self, rows: Int[Tensor, " rows"]) -> "Records":
        """Return the records of some rows."""
        return Records({number: record.select(rows) for number, record in self.items()})


def decoder_layers(model: nn.Module) -> list[Any]:
    """Our decoder layers, or the causal attention modules of another family's model, in order.

    Raises:
        ValueError: a model that has neither.
    """
    own = [module for module in model.modules() if isinstance(module, HybridMemLayer)]
    if own:
        return own
    modules: list[Any] = list(model.modules())
    found = {
        module.layer_idx: module
        for module in modules
        if isinstance(getattr(module, "layer_idx", None), int) and getattr(module, "is_causal", False)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no causal attention modules with a layer_idx: its attention cannot be recorded"
        )
    return [found[number] for number in sorted(found)]


def is_segmented(layer: Any) -> bool:
    """Whether a layer is one of mac's, whose attention is recorded segment by segment."""
    return isinstance(layer, HybridMemLayer) and isinstance(layer.mixer, ContextMixer)


class AttentionRecorder:
    """A context in which a model's forward passes leave `records`, one for each chosen layer.

    The model computes what it always does with its own attention implementation, and is left as it was. What is
    recorded carries gradients where the forward pass does. Records are those of the last forward pass; with a cache
    they hold that pass's queries and every key that is still seen. What was written to memory is recorded of all passes
    with one cache, which may have been repeated for several responses to a prompt.

    Args:
        model: a causal LM of transformers, ours or not, inside PEFT or not.
        layers: the layers' numbers, from the end if negative.
        times: how often each row of a cache is repeated between its passes; needed where not all are as often.

    Raises:
        ValueError: a layer that is not there or is under activation checkpointing; `eager` attention, which does not
            go through transformers' registry; attention that a softmax of q·k cannot say (soft caps, sinks).
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int] = (-1,), times: int | Int[Tensor, " rows"] | None = None
    ):
        found = decoder_layers(model)
        numbers = [n + len(found) if n < 0 else n for n in layers]
        if not numbers or not all(0 <= n < len(found) for n in numbers) or len(set(numbers)) < len(numbers):
            raise ValueError(f"layers={list(layers)} must name different ones of the model's {len(found)} layers")
        self.model, self.times = model, times
        self.layers = {n: found[n] for n in numbers}
        self.records: dict[int, LayerRecord] = {}
        self._key_mask: Bool[Tensor, "batch tokens"] | None = None
        self._cache: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> "AttentionRecorder":
        self._watch(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        called: dict[Any, int] = {}  # attention modules whose calls to the attention function are kept
        for number, layer in self.layers.items():
            if getattr(layer, "gradient_checkpointing", False) and layer.training:
                raise ValueError(
                    f"layer {number} is recorded and under activation checkpointing, which would run it twice: set its "
                    "gradient_checkpointing to False"
                )
            if not isinstance(layer, HybridMemLayer):
                called[layer] = number
            elif is_segmented(layer):
                called[layer.mixer.attention] = number
            if isinstance(layer, HybridMemLayer):
                self._watch_parts(number, layer)
        for implementation in {module.config._attn_implementation for module in called}:
            self._stack.enter_context(_intercepted(implementation, self._keeping_calls(called)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _watch(self, hook: Any) -> None:
        self._stack.callback(hook.remove)

    def _begin(self, _: nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        before, cache = self.records, arguments.get("past_key_values")
        self.records = {
            number: LayerRecord(layer.variant if isinstance(layer, HybridMemLayer) else "full")
            for number, layer in self.layers.items()
        }
        if cache is not None and cache is self._cache:
            for number, record in self.records.items():
                record.memory = before[number].memory
        self._cache = cache
        mask = arguments.get("attention_mask")
        self._key_mask = None if mask is None or mask.dim() != 2 or bool(mask.all()) else mask.bool()

    def _watch_parts(self, number: int, layer: HybridMemLayer) -> None:
        """Projections of our layers are made once more: cheaper than to have every layer hand them out."""

        def note_attention(attention: ShortRangeAttention, arguments: tuple[Any, ...], _: Any) -> None:
            self.records[number].attention = record_attention(attention, *arguments)

        def note_heads(mixer: HeadMixer, arguments: tuple[Any, ...], _: Any) -> None:
            self.records[number].attention = record_heads(mixer, *arguments)

        def note_gate(_: nn.Module, __: tuple[Any, ...], logits: Tensor) -> None:
            self.records[number].gate = torch.sigmoid(logits)

        def note_memory(memory: NeuralMemory, arguments: tuple[Any, ...], _: Any) -> None:
            inputs = record_memory(memory, *arguments)
            before = self.records[number].memory  # mac writes segment by segment; or it is that of an earlier pass
            if before is not None:
                inputs = _joined(before, inputs, self.times)
            self.records[number].memory = inputs
            self.records[number].memory_depth = memory.config.memory_depth

        if is_segmented(layer):
            self._watch(layer.mixer.register_forward_pre_hook(_check_segments))
        for module in layer.mixer.modules():
            if isinstance(module, ShortRangeAttention) and not isinstance(layer.mixer, ContextMixer):
                self._watch(module.register_forward_hook(note_attention))
            elif isinstance(module, HeadMixer):
                self._watch(module.register_forward_hook(note_heads))
            elif isinstance(module, NeuralMemory):
                self._watch(module.register_forward_hook(note_memory))
        if isinstance(layer.mixer, GateMixer):
            self._watch(layer.mixer.allocation_gate.register_forward_hook(note_gate))

    def _keeping_calls(self, called: dict[nn.Module, int]) -> Callable[[AttentionFunction], AttentionFunction]:
        """Wrap an attention function so that calls of `called` are noted."""

        def wrap(function: AttentionFunction) -> AttentionFunction:
            def keeping(module: nn.Module, query: Tensor, key: Tensor, *others: Any, **options: Any) -> Any:
                number = called.get(module)
                if number is not None:
                    record = _record_call(module, query, key, options)
                    if isinstance(module, ShortRangeAttention):
                        self.records[number].segments.append(record)
                    else:
                        self.records[number].attention = replace(record, key_mask=self._tokens_kept(key.shape[2]))
                return function(module, query, key, *others, **options)

            return keeping

        return wrap

    def _tokens_kept(self, keys: int) -> Bool[Tensor, "batch tokens"] | None:
        """The padding mask of the keys: a window's cache keeps the last ones only."""
        return None if self._key_mask is None else self._key_mask[:, self._key_mask.shape[1] - keys :]


@contextmanager
def recording(model: nn.Module, layers: Sequence[int], times: int | Int[Tensor, " rows"]) -> Iterator[Records]:
    """Record one pass; the records are there when the context ends (see AttentionRecorder)."""
    records = Records()
    with AttentionRecorder(model, layers, times) as recorder:
        yield records
        records.update(recorder.records)


def _check_segments(_: nn.Module, arguments: tuple[Any, ...]) -> None:
    sequence: TokenSequence = arguments[-1]
    if sequence.document_ids is not None:
        raise ValueError(
            "mac cuts padded rows, and those of several documents, into segments of their own, which cannot be "
            "recorded: give prompts of one length, a document each, or record a layer of another variant"
        )


def _record_call(module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> AttentionRecord:
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise ValueError(f"{type(module).__name__} attends with {name}: its distribution is not a softmax of q·k")
    persistent = module.num_persistent if isinstance(module, ShortRangeAttention) else 0
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return AttentionRecord(query, key, scale, options.get("sliding_window"), persistent)


def record_attention(
    attention: ShortRangeAttention,
    x: Float[Tensor, "batch time hidden"],
    state: AttentionState | None,
    sequence: TokenSequence,
) -> AttentionRecord:
    """Queries and keys of our own attention."""
    if sequence.document_ids is not None and sequence.document_ids.max() > 0:
        raise ValueError("rows of several documents cannot be recorded: give one document a row")
    q, k, v, _ = attention.project(x, None if state is None else state.convolution, sequence)
    if state is not None:
        k, v = torch.cat((state.keys.to(k.dtype), k), 2), torch.cat((state.values.to(v.dtype), v), 2)
    k, _ = attention.with_persistent(k, v)
    mask, documents = sequence.mask, None if state is None else state.document_ids
    if state is not None and (mask is not None or documents is not None):
        before = state.keys.new_ones(len(x), state.keys.shape[2]) if documents is None else documents
        mask = torch.ones_like(x[:, :, 0], dtype=torch.bool) if mask is None else mask
        mask = torch.cat((before >= 0, mask), dim=1)
    return AttentionRecord(q, k, attention.scaling, attention.window, attention.num_persistent, mask)


def record_heads(
    mixer: HeadMixer, x: Float[Tensor, "batch time hidden"], state: HeadsState | None, sequence: TokenSequence
) -> AttentionRecord:
    """Return the queries and keys of a `mah` layer.

    Under an allocation (`full_share`) the record is that of all keys, which an open head attends to.

    Raises:
        ValueError: rows of several documents; heads that do not all read `full`, which no one window describes.
    """
    if sequence.document_ids is not None and sequence.document_ids.max() > 0:
        raise ValueError("rows of several documents cannot be recorded: give one document a row")
    code = mixer.sources_code(sequence)
    if not code.endswith("+") and code != "f" * mixer.kv_heads:
        raise ValueError(
            f"layer {mixer.layer_idx} has heads that do not read everything and cannot be recorded: record a layer "
            "whose head_sources are all full"
        )
    tokens = mixer.project(x, sequence)
    k, mask, before = tokens.k, sequence.mask, None if state is None else state.full or state.sliding
    if before is not None:
        k = torch.cat((before.keys.to(k.dtype), k), 2)
        places = before.document_ids if isinstance(before, FullKeys) else before.places and before.places.document_ids
        if mask is not None or places is not None:
            kept = before.keys.new_ones(len(x), before.keys.shape[2]) if places is None else places
            mask = torch.ones_like(x[:, :, 0], dtype=torch.bool) if mask is None else mask
            mask = torch.cat((kept >= 0, mask), dim=1)
    return AttentionRecord(tokens.q, k, mixer.scaling, mixer.sliding_window, 0, mask)


def record_memory(
    memory: NeuralMemory,
    x: Float[Tensor, "batch time hidden"],
    state: NeuralMemoryState | None,
    sequence: TokenSequence,
) -> ScanInputs:
    """What a memory reads and writes; padding writes nothing."""
    inputs, _ = memory.scan_inputs(x, None if state is None else state.convolution, sequence)
    if sequence.mask is None:
        return inputs
    mask = sequence.mask[:, None]
    return inputs._replace(
        alpha=inputs.alpha.where(mask, 0), eta=inputs.eta.where(mask, 1), theta=inputs.theta.where(mask, 0)
    )


def _joined(before: ScanInputs, after: ScanInputs, times: int | Int[Tensor, " rows"] | None) -> ScanInputs:
    """Inputs one after the other; earlier ones count for each of the rows that go on from them."""
    if len(before.q) < len(after.q):
        repeats = times.to(after.q.device) if isinstance(times, Tensor) else len(after.q) // len(before.q)
        before = ScanInputs(*(x.repeat_interleave(repeats, 0) for x in before))
    return ScanInputs(*(torch.cat(pair, dim=2) for pair in zip(before, after, strict=True)))


@contextmanager
def _intercepted(implementation: str, wrap: Callable[[AttentionFunction], AttentionFunction]) -> Iterator[None]:
    """Put a wrapper around an attention function of transformers' registry, for a while."""
    if implementation == "eager":
        raise ValueError(
            "eager attention does not go through transformers' registry: set attn_implementation to 'sdpa' to record it"
        )
    override = ALL_ATTENTION_FUNCTIONS._local_mapping.get(implementation)
    ALL_ATTENTION_FUNCTIONS[implementation] = wrap(ALL_ATTENTION_FUNCTIONS[implementation])
    try:
        yield
    finally:
        if override is None:
            del ALL_ATTENTION_FUNCTIONS[implementation]
        else:
            ALL_ATTENTION_FUNCTIONS[implementation] = override
