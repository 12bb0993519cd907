"""A retrofit beside `tptt` (extra `bench`): one model, one text, one loss, equal steps.

    python scripts/bench_retrofit.py --base SMOLLM2 [--steps 40] [--rows 20] [--output docs/data/retrofit_peers.json]

Both start from the base model with a window, train adapters of one rank, and match the base model's next-token
distribution beyond window and sinks on the same rows of the standard library's source, a row and an arm in turn. `tptt`
mixes the window with a linear attention through the base model's projections, as `get_tptt_model` sets it up; its
window has no sinks, because Mistral's has none. hybridmem trains memories in all heads besides. Held-out nats are
measured before and after.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from hybridmem.data import TextDataModule
from hybridmem.rl.rollouts.policy import lower_precision
from hybridmem.training import RetrofitModule
from hybridmem.training.retrofit import PROJECTIONS
from hybridmem.training.retrofit_losses import every_source, read
from hybridmem.training.schedules import WarmupCosine

WINDOW, SINKS, LENGTH = 64, 4, 512
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16}
MIX = 0.5  # weight of tptt's linear attention at the end, its default


class Arm(NamedTuple):
    """A model in training; `logits` reads a row."""

    model: nn.Module
    logits: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler


def prepare_ours(base: str) -> RetrofitModule:
    """Return the base model with new memories and adapters in all heads."""
    module = RetrofitModule(base, "kl", attention_window=WINDOW, num_sink_tokens=SINKS, lora=LORA)
    module.configure_model()
    lower_precision(module.causal, "bfloat16")
    return module


def prepare_tptt(base: str) -> Any:
    """Return the base model with a sliding window, tptt's linear attention, and adapters."""
    tptt = import_module("tptt")
    source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    shared = {name: value for name, value in source.config.to_dict().items() if name not in ("architectures", "dtype")}
    # The eager attention adds its mask; tptt turns the boolean mask of the fused ones into zeros and ones.
    config = MistralConfig(**shared, sliding_window=WINDOW, attn_implementation="eager")
    model = MistralForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model = tptt.get_tptt_model(model, config, mag_weight=0.0)[0].to(torch.bfloat16)
    names = [f"base_attn.{name}" for name in PROJECTIONS]
    return get_peft_model(model, LoraConfig(target_modules=names, **LORA))


def set_mix(model: Any, weight: float) -> None:
    """Set the weight of tptt's linear attention."""
    for module in model.modules():
        if hasattr(module, "memory_gate"):
            module.memory_gate.mag_weight = torch.tensor(weight)


def arm(model: nn.Module, logits: Callable[[Tensor], Tensor], lr: float, steps: int) -> Arm:
    """Return a model with the optimiser and schedule that both share."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    return Arm(model, logits, optimizer, WarmupCosine(optimizer, steps, warmup_steps=min(10, steps - 1)))


def rows(tokenizer: str, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return rows of one document each, for training and held out."""
    data = TextDataModule(
        tokenizer=tokenizer, sequence_length=LENGTH, batch_size=1, max_bytes=4_000_000, max_val_bytes=200_000,
        encoding_errors="replace",
    )  # fmt: skip
    data.setup("fit")
    return _whole(data.train_dataloader(), count), _whole(data.val_dataloader(), count)


def _whole(batches: Any, count: int) -> list[Tensor]:
    """Return the first rows without a document's end."""
    found: list[Tensor] = []
    for batch in batches:
        if (batch["document_ids"] == batch["document_ids"][0, 0]).all():
            found.append(batch["input_ids"])
        if len(found) == count:
            break
    return found


def step(trained: Arm, row: Tensor, wanted: Tensor) -> float:
    """Take a step towards the base model's next-token distribution, and return its seconds."""
    began = time.perf_counter()
    logs = F.log_softmax(trained.logits(row)[0, WINDOW + SINKS :].float(), dim=-1)
    loss = F.kl_div(logs, wanted, log_target=True, reduction="batchmean")
    loss.backward()
    nn.utils.clip_grad_norm_(trained.model.parameters(), 1.0)
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    trained.schedule.step()
    return time.perf_counter() - began


@torch.no_grad()
def nats(logits: Callable[[Tensor], Tensor], held_out: list[Tensor]) -> float:
    """Return nats per token beyond window and sinks."""
    found = [
        F.cross_entropy(logits(row)[0, WINDOW + SINKS : -1].float(), row[0, WINDOW + SINKS + 1 :]) for row in held_out
    ]
    return float(torch.stack(found).mean())


def ours_logits(module: RetrofitModule, source: str | None = None) -> Callable[[Tensor], Tensor]:
    """Return a function from tokens to logits, with one source in all heads or with the memories."""
    model = module.causal

    def logits(row: Tensor) -> Tensor:
        found: Tensor = model.lm_head(
            read(model, {"input_ids": row}, None if source is None else every_source(model, source))
        )
        return found

    return logits


def teacher(module: RetrofitModule) -> Callable[[Tensor], Tensor]:
    """Return a function from tokens to the base model's logits."""

    def logits(row: Tensor) -> Tensor:
        with module.model.disable_adapter():
            return ours_logits(module, "full")(row)

    return logits


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train both arms on the same rows, and yield the results so far."""
    training, held_out = rows(options.base, max(options.steps, options.rows))
    held_out = held_out[: options.rows]
    module, peer = prepare_ours(options.base), prepare_tptt(options.base)
    base, window = teacher(module), ours_logits(module, "none")

    def peer_logits(row: Tensor) -> Tensor:
        found: Tensor = peer(row, use_cache=False).logits
        return found

    arms = {
        "hybridmem": arm(module.model, ours_logits(module), options.lr, options.steps),
        "tptt": arm(peer, peer_logits, options.lr, options.steps),
    }
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "torch": torch.__version__,
        "steps": options.steps,
        "rows": len(held_out),
        "lr": options.lr,
        "full": nats(base, held_out),
        "window and sinks": nats(window, held_out),
        "window": nats(peer_logits, held_out),
        "trained": {n: sum(p.numel() for p in a.model.parameters() if p.requires_grad) for n, a in arms.items()},
    }
    yield found
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number, row in enumerate(training[: options.steps]):
        with torch.no_grad():
            wanted = F.log_softmax(base(row)[0, WINDOW + SINKS :].float(), dim=-1)
        set_mix(peer, MIX * (number + 1) / options.steps)
        for name, trained in arms.items():
            seconds[name].append(step(trained, row, wanted))
        print(number + 1, {name: round(values[-1], 1) for name, values in seconds.items()}, flush=True)
    for name, trained in arms.items():
        found[name] = {"nats": nats(trained.logits, held_out), "seconds a step": statistics.median(seconds[name])}
        yield found


def main() -> None:
    """Compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Llama model of transformers")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=20, help="held-out rows")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/data/retrofit_peers.json"))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for found in compare(options):
        print(json.dumps(found, indent=2), flush=True)
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
