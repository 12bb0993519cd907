"""One-minute benchmark of time ratios against baselines, compared with the committed ratios.

    python scripts/bench_all.py                          # compare with docs/data/bench.json
    python scripts/bench_all.py --output docs/data/bench.json # update docs/data/bench.json

Each ratio is a time divided by the time of a baseline in the same run; lower is better. Ratios hardly depend on the
machine, so a changed ratio means changed code. On a busy machine they vary by some tens of percent. The script only
reports; no ratio makes it fail.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from bench_decode import decoder, make_models
from bench_measure import in_turn, ratio
from bench_memory import BATCH, divergence_step, layer_step, our_model, products_of, scan_step
from torch import nn
from transformers import DynamicCache

from hybridmem.compare.environment import processor
from hybridmem.training.allocator import keep_freed_memory
from hybridmem.training.denormals import flush_denormals

COMMITTED = Path(__file__).parents[1] / "docs" / "data" / "bench.json"
Pair = tuple[Callable[[], object], Callable[[], object]]


def scan(depth: int) -> Pair:
    """Return a scan, and its matrix products alone."""
    step = scan_step(depth, BATCH, 512)
    return step, products_of(step)


def layers() -> Pair:
    """Return a memory layer, and window attention on as many tokens."""
    return layer_step("ours", 1, 1, 512), divergence_step(4 * 512, 256)["layer"]


def divergence() -> Pair:
    """Return the divergence of two attentions, and the attention layer."""
    steps = divergence_step(1024, 256)
    return steps["divergence"], steps["layer"]


def models() -> Pair:
    """Return a mag model, and a swa model with as many parameters."""
    mag = our_model("mag")
    swa = our_model("swa", sum(p.numel() for p in mag.parameters()))
    ids = torch.randint(0, 256, (1, 512))

    def step(model: nn.Module) -> Callable[[], object]:
        return lambda: model(ids, labels=ids, use_cache=False).loss.backward()

    return step(mag), step(swa)


def decoding() -> Pair:
    """Return the decoding of tokens after 16,000 others, and after 500."""
    model = our_model("mag").eval()
    token = torch.randint(0, 256, (1, 1))

    def step(read: int) -> Callable[[], object]:
        cache = DynamicCache(config=model.config)

        @torch.no_grad()
        def decode() -> None:
            for _ in range(10):
                model(token, past_key_values=cache, use_cache=True)

        with torch.no_grad():
            for _ in range(0, read, 500):
                model(torch.randint(0, 256, (1, 500)), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return decode

    return step(16_000), step(500)


def decoding_memory(batch: int) -> Pair:
    """Return the decoding of a token by a mag model, and by a swa model."""
    mag, swa = (decoder(our_model(variant).eval(), batch, 300) for variant in ("mag", "swa"))
    return mag, swa


def decoding_beside_llama() -> Pair:
    """Return the decoding of a token by a converted Llama, and by the Llama."""
    models = make_models(["Llama", "converted Llama"])
    return decoder(models["converted Llama"], 1, 300), decoder(models["Llama"], 1, 300)


def precisions() -> Pair:
    """Return a training step in bfloat16, and in float32."""
    model, ids = our_model("mag"), torch.randint(0, 256, (1, 512))

    def step(bfloat16: bool) -> Callable[[], object]:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()

        return run

    return step(True), step(False)


RATIOS: dict[str, Callable[[], Pair]] = {
    "memory_scan / its products": lambda: scan(1),
    "memory_mlp_scan / its products": lambda: scan(2),
    "memory layer / attention layer": layers,
    "attention_divergence / attention layer": divergence,
    "mag model / swa model": models,
    "decoding at 16,000 / at 500": decoding,
    "decoding, mag / swa": lambda: decoding_memory(1),
    "decoding 64 rows, mag / swa": lambda: decoding_memory(64),
    "decoding, converted Llama / Llama": decoding_beside_llama,
    "mag model, bfloat16 / float32": precisions,
}


def measure(pair: Pair, rounds: int) -> float:
    """Return the median ratio of a pair."""
    return round(ratio(in_turn(dict(zip(("timed", "baseline"), pair, strict=True)), rounds), "timed", "baseline"), 3)


def line(name: str, now: float, before: float | None) -> str:
    """Format a line of the report."""
    change = "      new" if before is None else f"{before:8.3f}  {now / before - 1:+.0%}"
    return f"{name:42}{now:8.3f}  before {change}"


def main() -> None:
    """Measure and report all ratios, and write them if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="1 gives steadier ratios on a shared machine")
    parser.add_argument("--output", type=Path, help="JSON file for the ratios")
    arguments = parser.parse_args()
    keep_freed_memory()
    flush_denormals()
    torch.set_num_threads(arguments.threads)
    committed = json.loads(COMMITTED.read_text())
    print(f"on {processor()}; the committed ratios on {committed['processor']}")
    ratios = {}
    for name, make in RATIOS.items():
        torch.manual_seed(0)
        ratios[name] = measure(make(), arguments.rounds)
        print(line(name, ratios[name], committed["ratios"].get(name)), flush=True)
    if arguments.output:
        text = json.dumps({"processor": processor(), "ratios": ratios}, indent=1)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
