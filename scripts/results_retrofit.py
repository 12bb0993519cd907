"""Retrofits SmolLM2, and measures nats beyond the window, exact answers, state bytes and time.

    python scripts/results_retrofit.py train --base BASE [--cells plain,depth 2] [--seeds 0,1,2] [--steps 300]
    python scripts/results_retrofit.py measure --checkpoint CKPT --output docs/data/retrofit.json [--ways full]
    python scripts/results_retrofit.py curve --run FOLDER

`train` runs configs/retrofit/smollm2.yaml with the changes of each cell, one run after another; it resumes interrupted
runs and skips finished ones. `measure` adds its results to the output under the checkpoint's name. `curve` prints the
validation metrics in a run's log by step.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from hybridmem.data import TextDataModule, load_tokenizer
from hybridmem.data.task_module import chat_tokens
from hybridmem.model.cache import state_bytes
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.rl.rollouts.policy import lower_precision
from hybridmem.tasks import Facts
from hybridmem.training.checkpoints.contents import load_policy, tokenizer_of_policy
from hybridmem.training.checkpoints.durable import to_go_on_from
from hybridmem.training.logs import read_log
from hybridmem.training.retrofit_losses import beyond_window, every_source, nats_beyond, read

ROOT = Path("runs/results_retrofit")
CONFIG = Path("configs/retrofit/smollm2.yaml")
CELLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no forgetting": {"memory": {"memory_forgetting": False}},
    "no momentum": {"memory": {"memory_momentum": False}},
    "no feature maps": {"frozen": ["q_map.*", "k_map.*"]},
    "constant mixing gate": {"frozen": ["mixing_gate.weight", "window_mass"]},
    "depth 2": {"memory": {"memory_depth": 2}},
}
WAYS = {"full": "full", "window": "none", "hybrid": None}  # source of all heads; None: the checkpoint's sources
LENGTHS = {400: 1600, 1000: 4000, 4000: 16000}  # approximate tokens and characters of a prompt
MAX_NEW_TOKENS = 20


def train(base: str, cell: str, seed: int, steps: int) -> None:
    """Train a cell with a seed, resuming an interrupted run."""
    folder = ROOT / cell.replace(" ", "_") / str(seed)
    if (folder / f"step={steps}.ckpt").exists():
        return
    started = to_go_on_from(folder)
    resume = [] if started is None else ["--ckpt_path", str(started)]
    changes = [f"--model.init_args.{name}={json.dumps(value)}" for name, value in CELLS[cell].items()]
    text = CONFIG.read_text().replace("HuggingFaceTB/SmolLM2-135M-Instruct", base)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "given.yaml").write_text(text)
    command = [
        *(sys.executable, "-m", "hybridmem", "fit", "--config", str(folder / "given.yaml"), *changes, *resume),
        *("--seed_everything", str(seed), "--data.init_args.seed", str(seed)),
        *("--trainer.max_steps", str(steps), "--trainer.default_root_dir", str(folder)),
    ]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def measure_nats(model: HybridMemForCausalLM, tokenizer: str, ways: list[str], rows: int) -> dict[str, Any]:
    """Return nats per token of held-out source beyond window and sinks, and beyond 128 tokens.

    The rows of 512 tokens are evenly spaced in 200 kB of the standard library's held-out files.
    """
    data = TextDataModule(
        tokenizer=tokenizer,
        sequence_length=512,
        batch_size=1,
        max_bytes=100_000,
        max_val_bytes=200_000,
        encoding_errors="replace",
    )
    data.setup("validate")
    reach = model.config.attention_window + model.config.num_sink_tokens
    totals: dict[str, list[float]] = {way: [0.0, 0.0, 0.0, 0.0] for way in ways}
    batches = list(data.val_dataloader())
    chosen = [batches[n * len(batches) // rows] for n in range(rows)]
    for number, batch in enumerate(chosen):
        for way in ways:
            hidden = read(model, batch, sources(model, way))
            for place, start in enumerate((reach, 128)):
                counted = beyond_window(batch["document_ids"], start) & (batch["shift_labels"] >= 0)
                nats = nats_beyond(model, hidden, batch["shift_labels"], counted)
                totals[way][2 * place] += float(nats.double().sum())
                totals[way][2 * place + 1] += len(nats)
        print(number, {way: round(t[0] / max(t[1], 1), 4) for way, t in totals.items()}, flush=True)
    return {
        way: {"beyond window": a / b, "tokens": b, "beyond 128": c / d, "tokens beyond 128": d}
        for way, (a, b, c, d) in totals.items()
    }


def sources(model: HybridMemForCausalLM, way: str) -> list[list[str]] | None:
    """Return the head sources of an entry of WAYS."""
    source = WAYS[way]
    return None if source is None else every_source(model, source)


def answer(model: HybridMemForCausalLM, prompt: list[int], ends: set[int]) -> tuple[list[int], dict[str, float]]:
    """Return a greedy answer, with the seconds of prefill, the seconds per token and the state's bytes."""
    cache = DynamicCache(config=model.config)
    started = time.perf_counter()
    ids = torch.tensor([prompt])
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    read_seconds, size = time.perf_counter() - started, state_bytes(cache)
    found: list[int] = []
    started = time.perf_counter()
    while len(found) < MAX_NEW_TOKENS:
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        found.append(token)
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits
    seconds = (time.perf_counter() - started) / max(1, len(found))
    return found, {"read seconds": read_seconds, "seconds per token": seconds, "state bytes": size}


def measure_answers(
    model: HybridMemForCausalLM, tokenizer: PreTrainedTokenizerBase, way: str, length: int, count: int
) -> dict[str, Any]:
    """Return the share of exactly answered held-out prompts with four facts, with mean times and state sizes."""
    task = Facts(length=LENGTHS[length])
    ends = {tokenizer.eos_token_id}
    right, tokens, figures = 0.0, 0, []
    with model.head_sources(sources(model, way)):
        for index in range(count):
            example = task.example("val", index)
            prompt = chat_tokens(tokenizer, example["prompt"])
            found, seen = answer(model, prompt, ends)
            text = tokenizer.decode(found, skip_special_tokens=True)
            right += task.reward([example["prompt"]], [text], [example["answer"]])[0]
            tokens += len(prompt)
            figures.append(seen)
            print(way, length, index, right, repr(text), flush=True)
    means = {name: sum(seen[name] for seen in figures) / count for name in figures[0]}
    return {"exact": right / count, "prompts": count, "mean tokens": tokens / count, **means}


@torch.inference_mode()
def measure(options: argparse.Namespace) -> None:
    """Measure a checkpoint or folder, and add the results to the output."""
    model = load_policy(options.checkpoint)
    own = tokenizer_of_policy(options.checkpoint)
    tokenizer = load_tokenizer(options.tokenizer) if own is None or options.tokenizer else own
    lower_precision(model, "bfloat16")
    model.eval()
    ways = options.ways.split(",")
    counts = [int(n) for n in options.prompts.split(",")]
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, shared",
        "torch": torch.__version__,
        "attention_window": model.config.attention_window,
        "num_sink_tokens": model.config.num_sink_tokens,
        "command": " ".join(sys.argv),
    }
    if options.rows:
        found["nats"] = measure_nats(model, options.tokenizer or tokenizer.name_or_path, ways, options.rows)
    found["answers"] = {way: {} for way in ways}
    path = Path(options.output)
    for length, count in zip(LENGTHS, counts, strict=False):
        for way in ways:
            if count:
                found["answers"][way][str(length)] = measure_answers(model, tokenizer, way, length, count)
                write(path, options.name or Path(options.checkpoint).name, found)
    write(path, options.name or Path(options.checkpoint).name, found)


def write(path: Path, name: str, found: dict[str, Any]) -> None:
    """Add results to a JSON file under a name."""
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | {name: found}, indent=2) + "\n")


def curve(run: Path) -> None:
    """Print the validation metrics by step as a Markdown table."""
    log = read_log(run)
    names = [*(f"val/nats/{way}" for way in WAYS), "val/recovered"]
    print("| step | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for step in sorted(log.get(names[0], {})):
        print(f"| {step + 1} | " + " | ".join(f"{log[name][step]:.4f}" for name in names) + " |")


def main() -> None:
    """Train, measure or print a curve, as requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train")
    command.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    command.add_argument("--cells", default=",".join(CELLS))
    command.add_argument("--seeds", default="0,1,2")
    command.add_argument("--steps", type=int, default=300)
    command = commands.add_parser("measure")
    command.add_argument("--checkpoint", required=True)
    command.add_argument("--tokenizer", help="tokenizer folder or name, if the checkpoint's has moved")
    command.add_argument("--name", help="name in the output (default: the checkpoint's)")
    command.add_argument("--ways", default=",".join(WAYS), help="head sources to measure")
    command.add_argument("--rows", type=int, default=40, help="number of rows of held-out text")
    command.add_argument("--prompts", default="48,24,8", help="number of prompts of 400, 1,000 and 4,000 tokens")
    command.add_argument("--output", default="docs/data/retrofit.json")
    command = commands.add_parser("curve")
    command.add_argument("--run", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "train":
        for seed in map(int, options.seeds.split(",")):
            for cell in options.cells.split(","):
                train(options.base, cell, seed, options.steps)
    elif options.command == "measure":
        measure(options)
    else:
        curve(options.run)


if __name__ == "__main__":
    main()
