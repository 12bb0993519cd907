"""Decoding token by token on a CPU, compared with transformers' Llama, Mistral and Mamba-2 of equal width and depth.

    python scripts/bench_decode.py [--batches 1 64] [--compile] [--output docs/data/decode.json]

Every model has four layers of width 256 and has read a prompt; the prompt's state is repeated for the rows of a batch.
Models take turns, one token each; figures are medians, and ratios are medians over rounds. Operators are the ATen calls
of one token. The converted models are this Llama and this Mistral.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_measure import in_turn, ratio
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.compare.environment import processor
from hybridmem.convert import convert
from hybridmem.training.allocator import keep_freed_memory
from hybridmem.training.denormals import flush_denormals

WIDTH, LAYERS, VOCABULARY = 256, 4, 259
SHAPE = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=768, num_hidden_layers=LAYERS)
HEADS = dict(num_attention_heads=4, num_key_value_heads=4)
OURS = ("mag", "mac", "mal", "lmm", "swa", "full")
# (timed, baseline, the ratio that it should not exceed) by batch size
BARS = {
    1: [
        ("mag", "Llama", 2.0), ("lmm", "Mamba-2", 1.0), ("mac", "mag", 1.5),
        ("converted Llama", "Llama", 1.1), ("converted Mistral", "Mistral", 1.1),
    ],
    64: [("mag", "swa", 1.5)],
}  # fmt: skip


class OperatorCount(TorchDispatchMode):
    """A context that counts ATen calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def make_models(names: list[str]) -> dict[str, nn.Module]:
    """Build the models by name, untrained."""
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS))
    mistral = MistralForCausalLM(MistralConfig(**SHAPE, **HEADS, sliding_window=256))
    makers: dict[str, Callable[[], nn.Module]] = {
        "Llama": lambda: llama,
        "converted Llama": lambda: convert(llama),
        "converted Llama, memory heads": lambda: convert(llama, head_source="memory"),
        "Mistral": lambda: mistral,
        "converted Mistral": lambda: convert(mistral),
        "Mamba-2": lambda: Mamba2ForCausalLM(mamba2_config()),
        **{variant: partial(our_model, variant) for variant in OURS},
    }
    return {name: make().eval() for name, make in makers.items() if not names or name in names}


def our_model(variant: str) -> HybridMemForCausalLM:
    """Build a model of one variant."""
    return HybridMemForCausalLM(HybridMemConfig(variant=variant, **SHAPE))


def mamba2_config() -> Mamba2Config:
    """Return a Mamba-2 of the same width and depth, inner channels twice as wide as usual there."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS)
    return Mamba2Config(**sizes, expand=2, head_dim=64, num_heads=2 * WIDTH // 64, n_groups=1)


def decoder(model: nn.Module, batch: int, prompt: int, compiled: bool = False) -> Callable[[], object]:
    """Return a function that decodes a token after a prompt, once more with each call."""
    cache = DynamicCache(config=model.config)
    is_mamba = isinstance(model, Mamba2ForCausalLM)  # its cache cannot be repeated, and does not grow with the prompt
    name = "cache_params" if is_mamba else "past_key_values"
    step = torch.compile(model, dynamic=True) if compiled else model
    tokens = torch.randint(0, VOCABULARY, (batch, 1))
    with torch.no_grad():
        shape = (batch, 16) if is_mamba else (1, prompt)
        model(torch.randint(0, VOCABULARY, shape), **{name: cache}, use_cache=True)
        if batch > 1 and not is_mamba:
            cache.batch_repeat_interleave(batch)

    @torch.no_grad()
    def decode() -> object:
        return step(tokens, **{name: cache}, use_cache=True)

    return decode


def measure(models: dict[str, nn.Module], batch: int, prompt: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Time a token of all models at one batch size."""
    calls = {name: decoder(model, batch, prompt) for name, model in models.items()}
    if compiled:
        ours = {name: model for name, model in models.items() if isinstance(model, HybridMemForCausalLM)}
        calls |= {f"{name}, compiled": decoder(model, batch, prompt, True) for name, model in ours.items()}
    operators = {}
    for name, call in calls.items():
        call()
        if "compiled" not in name:
            with OperatorCount() as counted:
                call()
            operators[name] = counted.count
    seconds = in_turn(calls, rounds)
    rows = {
        name: {"milliseconds": round(statistics.median(of) * 1e3, 3), "operators": operators.get(name)}
        for name, of in seconds.items()
    }
    bars = [
        {"ratio": f"{timed} / {baseline}", "bar": bar, "measured": round(ratio(seconds, timed, baseline), 2)}
        for timed, baseline, bar in BARS.get(batch, [])
        if timed in seconds and baseline in seconds
    ]
    for name, row in rows.items():
        print(f"batch {batch:3}  {name:32}{row['milliseconds']:10.3f} ms{row['operators'] or '':>8}", flush=True)
    for row in bars:
        print(f"batch {batch:3}  {row['ratio']:32}{row['measured']:10.2f}     at most {row['bar']}", flush=True)
    return {"batch": batch, "models": rows, "bars": bars}


def main() -> None:
    """Measure every batch size, and write the figures down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--models", nargs="+", default=[], help="some of the models; all by default")
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="time torch.compile of our models too")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    flush_denormals()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    models = make_models(arguments.models)
    options = (arguments.prompt, arguments.rounds, arguments.compile)
    results = [measure(models, batch, *options) for batch in arguments.batches]
    if arguments.output:
        settings = dict(threads=arguments.threads, prompt=arguments.prompt, rounds=arguments.rounds)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"processor": processor(), "settings": settings, "batches": results}, indent=1)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
