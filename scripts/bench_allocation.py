"""Resident memory and seconds per token of a model with closed heads, against the model with all heads open.

    python scripts/bench_allocation.py --model models/smollm2 [--allocations FILE ...] [--closed 0.5 0.9]
        [--sources none memory] [--lengths 1024 2048 4096 8192 16384 32768] [--threads 1]

Every cell runs in its own process: it reads a text of random tokens in pieces, then decodes a few more one by one. The
models take turns at each length. Cells that are already in the output are not measured again.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_measure import resident_megabytes
from transformers import AutoConfig, DynamicCache

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.convert import Allocation, convert
from hybridmem.convert.allocation import kv_heads
from hybridmem.model.cache import state_bytes

OUTPUT = Path(__file__).parents[1] / "docs" / "data" / "bench_allocation.json"
LENGTHS = [1024 * 2**n for n in range(6)]
DECODED = 32
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings that all cells of an output share."""

    model: str
    window: int
    sinks: int
    piece: int
    threads: int


def random_allocation(
    config: Any, closed: float, source: str, settings: Settings, generator: random.Random
) -> Allocation:
    """Close a share of the heads, drawn at random."""
    heads = [(layer, head) for layer, count in enumerate(kv_heads(config)) for head in range(count)]
    sources = [["full"] * count for count in kv_heads(config)]
    for layer, head in generator.sample(heads, round(closed * len(heads))):
        sources[layer][head] = source
    return Allocation(settings.model, settings.window, settings.sinks, sources)


def build(model: str, allocation: Allocation) -> HybridMemForCausalLM:
    """Convert the model; a base model gets new memories, which take as long as fitted ones."""
    ours = AutoConfig.from_pretrained(model).model_type == HybridMemConfig.model_type
    if ours or not allocation.reads_memory:
        found = convert(model, allocation=allocation)
    else:
        window, sinks = allocation.attention_window, allocation.num_sink_tokens
        found = convert(model, window, sinks, head_source=allocation.head_sources)
    return found.to(torch.bfloat16).eval()


@torch.no_grad()
def measure(model: str, allocation: Allocation, tokens: int, piece: int, threads: int) -> Row:
    """Read `tokens` tokens and decode some more; return bytes and milliseconds per token.

    On one thread these are processor milliseconds, which other work on the machine hardly affects.
    """
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    loaded = build(model, allocation)
    ids = torch.randint(0, loaded.config.vocab_size, (1, tokens + DECODED), generator=torch.Generator().manual_seed(0))
    loaded(ids[:, :64])  # warm-up, not measured
    weights, cache = resident_megabytes(), DynamicCache(config=loaded.config)
    began = clock()
    for part in ids[:, :tokens].split(piece, dim=1):
        loaded(part, past_key_values=cache, logits_to_keep=1)
    prefill = clock() - began
    kept, resident = state_bytes(cache), resident_megabytes()
    decode = []
    for part in ids[:, tokens:].split(1, dim=1):
        began = clock()
        loaded(part, past_key_values=cache)
        decode.append(clock() - began)
    return {
        "state_mb": round(kept / 2**20, 6),
        "weights_resident_mb": round(weights, 1),
        "resident_mb": round(resident, 1),
        "prefill_ms_per_token": round(prefill / tokens * 1e3, 4),
        "decode_ms_per_token": round(statistics.median(decode) * 1e3, 3),
    }


def in_own_process(*arguments: Any) -> Row:
    """Measure a cell in a fork of this process, which has imported everything and computed nothing."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, arguments)


def code(allocation: Allocation) -> str:
    """Spell the sources by their first letters, layer by layer."""
    return " ".join("".join(source[0] for source in row) for row in allocation.head_sources)


def read_rows(output: Path, settings: Settings) -> list[Row]:
    """Return the rows that an interrupted run has written.

    Raises:
        ValueError: they were measured with other settings.
    """
    if not output.is_file():
        return []
    held = json.loads(output.read_text())
    if held["settings"] != vars(settings):
        raise ValueError(f"output={output} holds rows with other settings, {held['settings']}; choose another file")
    return held["rows"]


def write_rows(output: Path, settings: Settings, rows: list[Row]) -> None:
    """Write the settings, and one row per line."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    output.write_text(f'{{\n "settings": {json.dumps(vars(settings))},\n "rows": [\n{lines}\n ]\n}}\n')


def print_table(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Print a line for each length and model, with ratios to the model with all heads open."""
    print(
        f"{'tokens':>7}  {'model':22}{'state MB':>10}{'resident MB':>13}{'prefill ms':>12}{'decode ms':>11}"
        f"{'state':>8}{'prefill':>9}{'decode':>8}"
    )
    full = {row["tokens"]: row for row in rows if row["closed"] == 0}
    for row in sorted((row for row in rows if row["model"] in names), key=lambda row: row["tokens"]):
        keys = ("state_mb", "prefill_ms_per_token", "decode_ms_per_token")
        state, prefill, decode = (row[key] / full[row["tokens"]][key] for key in keys)
        print(
            f"{row['tokens']:>7,}  {row['model']:22}{row['state_mb']:>10.2f}{row['resident_mb']:>13.0f}"
            f"{row['prefill_ms_per_token']:>12.2f}{row['decode_ms_per_token']:>11.1f}"
            f"{state:>8.2f}{prefill:>9.2f}{decode:>8.2f}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the missing rows, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder or name")
    parser.add_argument("--allocations", nargs="*", type=Path, default=[], help="files of head sources")
    parser.add_argument("--closed", nargs="*", type=float, default=[0.5, 0.9], help="shares closed at random")
    parser.add_argument("--sources", nargs="+", choices=["none", "memory"], default=["none", "memory"])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--piece", type=int, default=1024, help="tokens that prefill reads at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    settings = Settings(Path(options.model).name, options.window, options.sinks, options.piece, options.threads)
    config = AutoConfig.from_pretrained(options.model)
    models = {"full": random_allocation(config, 0, "none", settings, random.Random(0))}
    for closed in options.closed:
        for source in options.sources:  # the same heads for each source
            name = f"{closed:.0%} {source}"
            models[name] = random_allocation(config, closed, source, settings, random.Random(0))
    models |= {path.stem: Allocation.load(path) for path in options.allocations}
    rows = read_rows(options.output, settings)
    for tokens in options.lengths:
        for name, allocation in models.items():
            key = {"tokens": tokens, "sources": code(allocation)}
            if any(key.items() <= row.items() for row in rows):
                continue
            figures = in_own_process(options.model, allocation, tokens, options.piece, options.threads)
            rows.append({"model": name, "closed": round(allocation.closed, 4), **key, **figures})
            write_rows(options.output, settings, rows)
    print_table([row for row in rows if row["tokens"] in options.lengths], list(models))


if __name__ == "__main__":
    main()
