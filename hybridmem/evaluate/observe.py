"""Reading of a text by a causal LM: tokens that attention and memory read, gates and surprise, by layer and head."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hybridmem.model.heads import HeadMixer
from hybridmem.model.memory import HeadMemory, ScanInputs
from hybridmem.model.modeling import HybridMemLayer
from hybridmem.rl.attention.distributions import (
    attention_by_head,
    memory_by_head,
    segment_weights,
    softmax_weights,
    surprise,
)
from hybridmem.rl.attention.recorder import AttentionRecorder, decoder_layers
from hybridmem.rl.attention.records import AttentionRecord, LayerRecord

from .readings import LayerReading, Reading, Reads, Series

BLOCK = 256  # queries whose weights are held at once
MEAN = "mean"


@dataclass
class HeadsRecord:
    """Queries and keys of a `mah` layer, with the writes and the shares of its memory heads."""

    attention: AttentionRecord
    sources: list[str]
    window: int
    sinks: int
    memory: ScanInputs | None = None
    memory_heads: list[int] = field(default_factory=list)
    memory_depth: int = 1
    first_write: int = 0
    share: Float[Tensor, "batch steps heads"] | None = None  # of the window, from `first_write` on


@torch.inference_mode()
def read(model: Any, ids: Int[Tensor, " tokens"], prompt_length: int, layers: Sequence[int], top: int) -> Reading:
    """Read a text, and keep the `top` strongest reads for every token, head and layer.

    Raises:
        ValueError: a layer does not exist, or its attention cannot be recorded (see AttentionRecorder).
    """
    found = decoder_layers(model)
    if not all(-len(found) <= number < len(found) for number in layers):
        raise ValueError(f"layers={list(layers)} must be indices into the model's {len(found)} layers")
    numbers = sorted({number % len(found) for number in layers})
    heads: dict[int, HeadsRecord] = {}
    recorded = [number for number in numbers if not _has_sources(found[number])]
    recorder = AttentionRecorder(model, recorded) if recorded else None
    with ExitStack() as stack:
        if recorder is not None:
            stack.enter_context(recorder)
        for number in numbers:
            if _has_sources(found[number]):
                _watch_heads(number, found[number].mixer, heads, stack)
        logits = model(ids[None].to(model.device), use_cache=False).logits[0]
    nats = torch.cat([ids.new_empty(0, dtype=torch.float32), *_nats(logits, ids)])
    records = {} if recorder is None else recorder.records
    readings = [
        _of_heads(_number(found[n], n), heads[n], len(ids), top)
        if n in heads
        else _of_record(_number(found[n], n), records[n], len(ids), top)
        for n in numbers
    ]
    return Reading(ids, prompt_length, nats, readings)


def _number(layer: Any, index: int) -> int:
    """Return a layer's number in its model, in which only some layers may have attention."""
    return index if isinstance(layer, HybridMemLayer) else layer.layer_idx


def _nats(logits: Float[Tensor, "tokens vocab"], ids: Int[Tensor, " tokens"]) -> Iterator[Float[Tensor, " some"]]:
    for start in range(0, len(ids) - 1, BLOCK):
        labels = ids[start + 1 : start + 1 + BLOCK].to(logits.device)
        yield F.cross_entropy(logits[start : start + len(labels)].float(), labels, reduction="none").cpu()


def _has_sources(layer: Any) -> bool:
    return isinstance(layer, HybridMemLayer) and isinstance(layer.mixer, HeadMixer)


def _watch_heads(number: int, mixer: HeadMixer, records: dict[int, HeadsRecord], stack: ExitStack) -> None:
    """Record a `mah` layer whose heads may have any sources."""

    def note_heads(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        x, _, sequence = arguments
        tokens, config = mixer.project(x, sequence), mixer.config
        assert config.head_sources is not None
        records[number] = HeadsRecord(
            AttentionRecord(tokens.q, tokens.k, mixer.scaling, mixer.sliding_window),
            config.head_sources[mixer.layer_idx],
            config.attention_window,
            config.num_sink_tokens,
            memory_depth=config.memory_depth,
        )

    def note_memory(memory: HeadMemory, arguments: tuple[Any, ...], _: Any) -> None:
        x, q, keys, values, _, mass, kv_heads, plan, _ = arguments
        if plan.first_write >= plan.time:  # no token left the window
            return
        record, heads = records[number], memory.query_heads(kv_heads)
        record.memory_heads, record.first_write = heads, plan.first_write
        record.memory = memory.scan_inputs(plan, q, keys, values, memory.gates(x, heads), heads)
        record.share = memory.window_share(x, mass, heads, plan)

    stack.callback(mixer.register_forward_pre_hook(note_heads).remove)
    if mixer.memory is not None:
        stack.callback(mixer.memory.register_forward_hook(note_memory).remove)


Block = tuple[int, int, Float[Tensor, "heads queries keys"]]  # the first query and the first key are tokens


def _of_record(number: int, record: LayerRecord, tokens: int, top: int) -> LayerReading:
    """Return the reading of a layer that AttentionRecorder recorded."""
    layer = LayerReading(number, record.variant)
    if record.attention is not None:
        heads = _names(range(record.attention.q.shape[1]))
        reads = _strongest(_attention_blocks(record.attention, tokens), heads, tokens, top)
        layer.reads["attention"] = reads
        if record.attention.num_persistent:
            layer.series.append(Series("attention to persistent tokens", heads, 1 - reads.total))
    elif record.segments:
        heads = _names(range(record.segments[0].q.shape[1]))
        layer.reads["attention"] = _strongest(_segment_blocks(record.segments), heads, tokens, top)
        layer.series += _segment_shares(record.segments, heads, layer.reads["attention"].total)
    if record.gate is not None:
        shares = record.gate[0].T.float().cpu()
        layer.series.append(Series("share of attention", _names(range(len(shares))), _with_mean(shares)))
    if record.memory is not None:
        heads = _names(range(record.memory.q.shape[1]))
        layer.series += _gates(record.memory, heads, 0, record.memory_depth)
        if record.memory_depth == 1:
            layer.reads["memory"] = _strongest(_memory_blocks(record.memory, 0, 0), heads, tokens, top)
    return layer


def _of_heads(number: int, record: HeadsRecord, tokens: int, top: int) -> LayerReading:
    """Return the reading of a `mah` layer."""
    groups = record.attention.q.shape[1] // record.attention.k.shape[1]
    layer = LayerReading(number, "mah", [source for source in record.sources for _ in range(groups)])
    heads = _names(range(record.attention.q.shape[1]))
    layer.reads["attention"] = _strongest(_source_blocks(record, layer.sources, tokens), heads, tokens, top)
    if record.memory is not None and record.share is not None:
        heads, start = _names(record.memory_heads), record.first_write
        shares = F.pad(record.share[0].T.float().cpu(), (start, 0), value=1.0)
        layer.series.append(Series("share of the window", heads, _with_mean(shares)))
        first_key = start - record.window
        layer.series += _gates(record.memory, heads, first_key, record.memory_depth)
        if record.memory_depth == 1:
            blocks = _memory_blocks(record.memory, start, first_key, own_write=True)
            layer.reads["memory"] = _strongest(blocks, heads, tokens, top)
    return layer


def _attention_blocks(record: AttentionRecord, tokens: int) -> Iterator[Block]:
    for start in range(0, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
        yield start, 0, attention_by_head(record.last_queries(end - start, tokens - end), end - start)[0]


def _segment_blocks(segments: list[AttentionRecord]) -> Iterator[Block]:
    start = 0
    for segment in segments:
        size = segment.q.shape[2]
        yield start, start, segment_weights(segment)[0, ..., -size:]
        start += size


def _source_blocks(record: HeadsRecord, sources: list[str], tokens: int) -> Iterator[Block]:
    """Yield the weights of heads that see all tokens, or a window with sinks."""
    full = torch.tensor([source == "full" for source in sources], device=record.attention.q.device)[:, None, None]
    for start in range(0, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
        part = record.attention.last_queries(end - start, tokens - end)
        yield start, 0, softmax_weights(part, torch.where(full, *_visible(record, start, end, full.device)))[0]


def _visible(
    record: HeadsRecord, start: int, end: int, device: torch.device
) -> tuple[Bool[Tensor, "queries keys"], Bool[Tensor, "queries keys"]]:
    """Return the keys that `full` heads see, and those in the window or among the sinks."""
    clock = torch.arange(end, device=device)
    distance = clock[start:, None] - clock
    causal, sliding = distance >= 0, record.attention.window
    seen = causal if sliding is None else causal & (distance < sliding)
    return seen, causal & ((distance < record.window) | (clock < record.sinks))


def _memory_blocks(inputs: ScanInputs, first_query: int, first_key: int, own_write: bool = False) -> Iterator[Block]:
    steps = inputs.q.shape[2]
    for start in range(0, steps, BLOCK):
        end = min(start + BLOCK, steps)
        until = ScanInputs(*(x[:, :, :end] for x in inputs))
        yield first_query + start, first_key, memory_by_head(until, end - start, own_write)[0]


def _strongest(blocks: Iterator[Block], heads: list[str], tokens: int, top: int) -> Reads:
    """Return the strongest reads of blocks of queries; queries without a block read nothing."""
    places = torch.zeros(len(heads), tokens, top, dtype=torch.long)
    weights, total = torch.zeros(len(heads), tokens, top), torch.zeros(len(heads), tokens)
    for start, first_key, by_head in blocks:
        by_head = _with_mean(by_head.float())
        found = by_head.topk(min(top, by_head.shape[2]), dim=-1)
        end, count = start + by_head.shape[1], found.values.shape[2]
        places[:, start:end, :count] = (found.indices + first_key).cpu()
        weights[:, start:end, :count] = found.values.cpu()
        total[:, start:end] = by_head.sum(-1).cpu()
    return Reads(heads, places, weights, total)


def _segment_shares(segments: list[AttentionRecord], heads: list[str], own: Tensor) -> list[Series]:
    """Return the shares of attention in mac on persistent tokens, recalled tokens and the segment's tokens."""
    front = segments[0].num_persistent
    persistent = torch.cat([segment_weights(segment)[0, ..., :front].sum(-1) for segment in segments], dim=1)
    persistent = _with_mean(persistent.float().cpu())
    shares = {"persistent tokens": persistent, "recalled tokens": 1 - own - persistent, "the segment": own}
    return [Series(f"attention to {name}", heads, values) for name, values in shares.items()]


def _gates(inputs: ScanInputs, heads: list[str], start: int, depth: int) -> list[Series]:
    """Return a memory's gates, and its surprise at depth 1, at the tokens that it wrote; the first one is `start`."""
    values = {"forgetting (alpha)": inputs.alpha, "momentum (eta)": inputs.eta, "write (theta)": inputs.theta}
    if depth == 1:
        values["surprise of the memory"] = surprise(inputs)
    by_head = {name: _with_mean(x[0].float().cpu()) for name, x in values.items()}
    return [Series(name, heads, x, start) for name, x in by_head.items() if bool(x.any())]


def _with_mean(by_head: Float[Tensor, "heads *rest"]) -> Float[Tensor, "one_more *rest"]:
    return torch.cat((by_head.mean(0, keepdim=True), by_head))


def _names(heads: Sequence[int]) -> list[str]:
    return [MEAN, *(f"head {number}" for number in heads)]
