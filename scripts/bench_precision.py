"""Train the quickstart's model in float32 and in bfloat16 side by side: speed, and both loss curves.

    python scripts/bench_precision.py [--steps 120] [--output docs/data/precision.json]

Both models start from the same weights and take the same batches in turn; bfloat16 is autocast, as Lightning's
`bf16-mixed`. On one thread, times are those of the processor.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from bench_measure import ratio

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.compare.environment import processor
from hybridmem.data import TextDataModule
from hybridmem.training.allocator import keep_freed_memory
from hybridmem.training.denormals import flush_denormals
from hybridmem.training.precision import bfloat16_hardware
from hybridmem.training.schedules import WarmupCosine

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
PRECISIONS = {"float32": False, "bfloat16": True}


class Run:
    """A model in training."""

    def __init__(self, settings: dict[str, Any], steps: int, bfloat16: bool):
        arguments = settings["model"]["init_args"]
        torch.manual_seed(0)
        self.model = HybridMemForCausalLM(HybridMemConfig(**arguments["config"])).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **arguments["optimizer"]["init_args"])
        warmup = min(steps // 4, arguments["lr_scheduler"]["init_args"]["warmup_steps"])
        self.schedule = WarmupCosine(self.optimizer, steps, warmup)
        self.clip, self.bfloat16 = settings["trainer"]["gradient_clip_val"], bfloat16
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, ids: torch.Tensor) -> None:
        """Take an optimiser step."""
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            loss = self.model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.seconds.append(clock() - began)
        self.losses.append(loss.item())


def means(values: list[float], parts: int) -> list[float]:
    """Return the mean of each of `parts` stretches."""
    size = len(values) // parts
    return [round(statistics.mean(values[n * size : (n + 1) * size]), 4) for n in range(parts)]


def main() -> None:
    """Train both, report, and write the figures down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    flush_denormals()
    torch.set_num_threads(arguments.threads)
    settings = yaml.safe_load(QUICKSTART.read_text())
    length = settings["data"]["init_args"]["sequence_length"]
    data = TextDataModule(sequence_length=length, batch_size=arguments.batch_size)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    runs = {name: Run(settings, arguments.steps, bfloat16) for name, bfloat16 in PRECISIONS.items()}
    for _ in range(arguments.steps):
        ids = next(batches)["input_ids"]
        for run in runs.values():
            run.step(ids)
    seconds = {name: run.seconds[1:] for name, run in runs.items()}
    tokens = arguments.batch_size * length
    figures = {
        "processor": processor(),
        "hardware": bfloat16_hardware(),
        "settings": dict(threads=arguments.threads, steps=arguments.steps, tokens_per_step=tokens),
        "tokens_per_second": {name: round(tokens / statistics.median(of)) for name, of in seconds.items()},
        "times_float32": round(ratio(seconds, "float32", "bfloat16"), 2),
        "loss": {name: means(run.losses, 8) for name, run in runs.items()},
    }
    print(json.dumps(figures, indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
