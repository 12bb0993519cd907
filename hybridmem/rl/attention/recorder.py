"""Recorder of attention and memory in selected layers of any causal LM of transformers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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

from .passes import AttentionFunction
from .records import AttentionRecord, LayerRecord, Records

UNSUPPORTED = ("softcap", "s_aux")  # options that change attention beyond a softmax of q·k


def decoder_layers(model: nn.Module) -> list[Any]:
    """Return HybridMem's decoder layers, or the causal attention modules of another model family, in order.

    Raises:
        ValueError: The model has neither.
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
        raise ValueError(f"cannot record attention of {type(model).__name__}: no module has is_causal and layer_idx")
    return [found[number] for number in sorted(found)]


def is_segmented(layer: Any) -> bool:
    """Return True if a layer has variant mac, whose attention is recorded segment by segment."""
    return isinstance(layer, HybridMemLayer) and isinstance(layer.mixer, ContextMixer)


class AttentionRecorder:
    """Context that records the forward passes of a model in `records`, one record per selected layer.

    The model keeps its outputs and its attention implementation, and is restored on exit. Records carry gradients if
    the forward pass does, and belong to the last pass. With a cache, they contain that pass's queries and all keys
    that are still visible. Memory writes are recorded over all passes with the same cache, even if its rows were
    repeated for several responses to a prompt.

    Args:
        model: any causal LM of transformers, with or without PEFT.
        layers: layer indices; negative indices count from the end.
        times: the number of repetitions of each cache row between passes; required if it differs between rows.

    Raises:
        ValueError: A layer does not exist or uses activation checkpointing; attention is `eager`, which bypasses
            transformers' registry; or attention is more than a softmax of q·k (soft caps, sinks).
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int] = (-1,), times: int | Int[Tensor, " rows"] | None = None
    ):
        found = decoder_layers(model)
        numbers = [n + len(found) if n < 0 else n for n in layers]
        if not numbers or not all(0 <= n < len(found) for n in numbers) or len(set(numbers)) < len(numbers):
            raise ValueError(f"layers={list(layers)} must be different indices into the model's {len(found)} layers")
        self.model, self.times = model, times
        self.layers = {n: found[n] for n in numbers}
        self.records: dict[int, LayerRecord] = {}
        self._key_mask: Bool[Tensor, "batch tokens"] | None = None
        self._cache: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> "AttentionRecorder":
        self._watch(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        called: dict[Any, int] = {}  # attention modules whose calls to the attention function are recorded
        for number, layer in self.layers.items():
            if getattr(layer, "gradient_checkpointing", False) and layer.training:
                raise ValueError(
                    f"cannot record layer {number} with gradient_checkpointing=True, which runs it twice: set the "
                    "layer's gradient_checkpointing to False"
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
        """Hook the parts of a HybridMem layer; the hooks recompute projections instead of making layers return them."""

        def note_attention(attention: ShortRangeAttention, arguments: tuple[Any, ...], _: Any) -> None:
            self.records[number].attention = record_attention(attention, *arguments)

        def note_heads(mixer: HeadMixer, arguments: tuple[Any, ...], _: Any) -> None:
            self.records[number].attention = record_heads(mixer, *arguments)

        def note_gate(_: nn.Module, __: tuple[Any, ...], logits: Tensor) -> None:
            self.records[number].gate = torch.sigmoid(logits)

        def note_memory(memory: NeuralMemory, arguments: tuple[Any, ...], _: Any) -> None:
            inputs = record_memory(memory, *arguments)
            before = self.records[number].memory  # of mac's previous segment, or of an earlier pass
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
        """Return a wrapper of attention functions that records the calls from the modules in `called`."""

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
        """Return the padding mask of the last `keys` tokens, because a window's cache keeps only those."""
        return None if self._key_mask is None else self._key_mask[:, self._key_mask.shape[1] - keys :]


@contextmanager
def recording(model: nn.Module, layers: Sequence[int], times: int | Int[Tensor, " rows"]) -> Iterator[Records]:
    """Record one pass; the yielded records are filled when the context ends (see AttentionRecorder)."""
    records = Records()
    with AttentionRecorder(model, layers, times) as recorder:
        yield records
        records.update(recorder.records)


def _check_segments(_: nn.Module, arguments: tuple[Any, ...]) -> None:
    sequence: TokenSequence = arguments[-1]
    if sequence.document_ids is not None:
        raise ValueError(
            "cannot record mac on padded rows or on rows with several documents: use prompts of equal length with one "
            "document each, or record a layer of another variant"
        )


def _record_call(module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> AttentionRecord:
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise ValueError(
                f"cannot record {type(module).__name__}, whose attention uses {name}: only a softmax of q·k can be "
                "recorded; choose another model or layer"
            )
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
    """Return the queries and keys of a ShortRangeAttention."""
    if sequence.document_ids is not None and sequence.document_ids.max() > 0:
        raise ValueError("cannot record rows with several documents: pass one document per row")
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
        ValueError: A row has several documents, or a head's source is not `full`, so no single window applies.
    """
    if sequence.document_ids is not None and sequence.document_ids.max() > 0:
        raise ValueError("cannot record rows with several documents: pass one document per row")
    code = mixer.sources_code(sequence)
    if not code.endswith("+") and code != "f" * mixer.kv_heads:
        raise ValueError(
            f"cannot record layer {mixer.layer_idx}, which has heads with a source other than full: choose a layer "
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
    """Return the scan inputs of a memory, with gates that make padding write nothing.

    Raises:
        ValueError: The memory skips some tokens, for which no gates exist.
    """
    if sequence.writes is not None or memory.router is not None:
        raise ValueError(
            "cannot record a memory that skips tokens: remove unit=write, or record a layer without memory"
        )
    inputs, _ = memory.scan_inputs(x, None if state is None else state.convolution, sequence)
    if sequence.mask is None:
        return inputs
    mask = sequence.mask[:, None]
    return inputs._replace(
        alpha=inputs.alpha.where(mask, 0), eta=inputs.eta.where(mask, 1), theta=inputs.theta.where(mask, 0)
    )


def _joined(before: ScanInputs, after: ScanInputs, times: int | Int[Tensor, " rows"] | None) -> ScanInputs:
    """Concatenate scan inputs in time; earlier rows are repeated for all rows that continue them."""
    if len(before.q) < len(after.q):
        repeats = times.to(after.q.device) if isinstance(times, Tensor) else len(after.q) // len(before.q)
        before = ScanInputs(*(x.repeat_interleave(repeats, 0) for x in before))
    return ScanInputs(*(torch.cat(pair, dim=2) for pair in zip(before, after, strict=True)))


@contextmanager
def _intercepted(implementation: str, wrap: Callable[[AttentionFunction], AttentionFunction]) -> Iterator[None]:
    """Wrap an attention function in transformers' registry inside the context."""
    if implementation == "eager":
        raise ValueError(
            "cannot record eager attention, which bypasses transformers' registry; set attn_implementation to 'sdpa'"
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
