"""Streams 2,000,000 tokens through one state, and compares memory and time per token with a full-attention model.

    python scripts/bench_stream.py [--tokens 2000000] [--output docs/data/stream.json]

Tokens are read in pieces of 1,000, and at every mark 32 more are decoded one by one. Memory is the resident set of the
process; each model has its own. The full-attention model stops once a piece takes ten times as long as its first ones.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from bench_measure import resident_megabytes
from transformers import DynamicCache

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.model.cache import state_bytes
from hybridmem.training.allocator import keep_freed_memory
from hybridmem.training.denormals import flush_denormals

PIECE = 1_000
SHAPE = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    attention_window=64,
    memory_heads=4,
    memory_head_dim=32,
    memory_chunk_size=32,
)


def marks(tokens: int) -> list[int]:
    """Return the positions of measurements: 10,000 tokens, then every tenth of the way."""
    return sorted({10_000, *(tokens * n // 10 // PIECE * PIECE for n in range(1, 11))})


@torch.no_grad()
def stream(variant: str, tokens: int, threads: int) -> list[dict[str, float]]:
    """Read `tokens` random bytes, and return a row of results per mark."""
    keep_freed_memory()
    flush_denormals()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = HybridMemForCausalLM(HybridMemConfig(variant=variant, **SHAPE)).eval()
    cache = DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, float]] = []
    pieces: list[float] = []
    first = 0.0
    for position in range(PIECE, tokens + 1, PIECE):
        ids = torch.randint(0, 256, (1, PIECE), generator=generator)
        started = time.perf_counter()
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        pieces.append(time.perf_counter() - started)
        if position == 3 * PIECE:
            first = statistics.median(pieces)
        if position in marks(tokens) or (variant == "full" and position in (2_000, 5_000, 20_000, 50_000)):
            rows.append(
                {
                    "tokens": position,
                    "resident_mb": round(resident_megabytes(), 1),
                    "state_kb": round(state_bytes(cache) / 1024, 1),
                    "us_per_token": round(statistics.median(pieces[-200:]) / PIECE * 1e6, 2),
                    "decode_ms": round(decode(model, cache, generator), 3),
                }
            )
            print_row(variant, rows[-1])
        if variant == "full" and first and pieces[-1] > 10 * first:
            print(
                f"{variant:8}  stopped at {position:,} tokens: a piece takes {pieces[-1] / first:.0f}x its first time"
            )
            break
    return rows


def decode(model: HybridMemForCausalLM, cache: DynamicCache, generator: torch.Generator, steps: int = 32) -> float:
    """Return the median milliseconds to decode one token."""
    seconds = []
    for _ in range(steps):
        ids = torch.randint(0, 256, (1, 1), generator=generator)
        started = time.perf_counter()
        model(ids, past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e3


def print_row(variant: str, row: dict[str, float]) -> None:
    """Print a line of the table."""
    print(
        f"{variant:8}{row['tokens']:>12,}{row['resident_mb']:>14.1f}{row['state_kb']:>12.1f}"
        f"{row['us_per_token']:>14.2f}{row['decode_ms']:>12.3f}",
        flush=True,
    )


def spread(rows: list[dict[str, float]], key: str) -> float:
    """Return the largest deviation of a result from its first value, in percent."""
    return max(abs(row[key] / rows[0][key] - 1) for row in rows) * 100


def main() -> None:
    """Stream all models, and report how constant memory and times were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--variants", nargs="+", default=["mag", "full"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    print(f"{'model':8}{'tokens':>12}{'resident MB':>14}{'state KB':>12}{'us per token':>14}{'decode ms':>12}")
    results = {}
    for variant in arguments.variants:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[variant] = pool.apply(stream, (variant, arguments.tokens, arguments.threads))
    for variant, rows in results.items():
        settled = [row for row in rows if row["tokens"] >= 10_000]
        print(
            f"{variant}: largest deviations after 10,000 tokens: {spread(settled, 'resident_mb'):.1f} % in resident "
            f"memory, {spread(settled, 'us_per_token'):.1f} % in time per token, "
            f"{spread(settled, 'decode_ms'):.1f} % in decoding"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
