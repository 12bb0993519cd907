"""Learns allocations of SmolLM2's heads, and measures accuracy against the share of closed heads.

    python scripts/results_allocation.py train --model runs/smollm2 --memory runs/retrofit/kl/step=25.ckpt
    python scripts/results_allocation.py measure --model runs/smollm2 --memory runs/retrofit/kl/step=25.ckpt
    python scripts/results_allocation.py measure --model runs/smollm2 --memory ... --task ruler --closed 0.9
    python scripts/results_allocation.py figures
    python scripts/results_allocation.py overlap
    python scripts/results_allocation.py files --closed 0.8,0.9,0.95

`train` runs configs/rl/allocation.yaml with the changes of each control, one run after another; it resumes interrupted
runs and skips finished ones. `measure` answers held-out prompts in blocks and adds each block to a row of the output,
so that an interrupted command can be repeated; besides `Facts`, the task of training, it measures the subtasks of
`Ruler` and the nats of held-out text. `figures` prints a table, and draws the curve and the map of heads. `overlap`
counts the heads that finished runs open in common.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from greedy_answers import answer
from matplotlib.figure import Figure
from measured import find_row, put_row, read_rows
from torch import Tensor

from hybridmem.convert import Allocation
from hybridmem.data.task_module import count_tokens
from hybridmem.evaluate.probes import held_out_text
from hybridmem.metrics.interval import mean_interval
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.rl import FixedAllocation
from hybridmem.rl.rollouts.policy import lower_precision
from hybridmem.rl.rollouts.sampling import evaluating
from hybridmem.tasks import Facts, Ruler
from hybridmem.training.callbacks.allocation import draw_allocation
from hybridmem.training.checkpoints.contents import load_policy, tokenizer_of_policy
from hybridmem.training.checkpoints.durable import newest_good
from hybridmem.training.checkpoints.loading import load_checkpoint

ROOT = Path("runs/results_allocation")
CONFIG = Path("configs/rl/allocation.yaml")
DATA = Path("docs/data/allocation.json")
FIGURE = Path("docs/results/allocation.png")
FILES = Path("configs/allocations")
MAP = Path("docs/results/allocation_map.png")
BLOCK, WINDOW, SINKS = 16, 64, 4
SHAPE = (30, 3)  # layers and KV heads of SmolLM2-135M
TEXT_LENGTH, BEYOND = 512, 128  # tokens of a row of text, and of its beginning, which is left out
SCORES = {"facts": "accuracy", "ruler": "accuracy", "text": "nats"}  # means of a cell's values
ANSWER_LENGTH = {"facts": 16, "ruler": 64}
CHARACTERS = {400: 1600, 1000: 4000, 4000: 16000}  # characters of a prompt with about this many tokens
OBJECTIVES = "model.init_args.objectives"
LONGER, REFINED = "reward, longer", "reward, refined"  # both begin with the control reward
SUPERVISED = {"cross-entropy": "AllocationSFT", "distillation": "AllocationDistillation"}
STEPS = {"reward": 150, LONGER: 50, REFINED: 50} | dict.fromkeys(SUPERVISED, 50)  # rollouts, or optimiser steps
LATER = 10
UNTRAINED = ("random", "last layers")


class Cell(NamedTuple):
    """One point: an order of heads, a source of the closed ones, and the share that is closed."""

    control: str
    source: str
    closed: float
    seed: int
    tokens: int
    window: int
    task: str

    @property
    def trains(self) -> bool:
        """True if the order of heads was learned."""
        return self.control not in UNTRAINED and 0 < self.closed < 1


def train(control: str, source: str, seed: int, model: str, tokenizer: str) -> None:
    """Run a control with a seed, or go on with it.

    `reward` reads prompts in full, which is cheap, and trains without a memory: its order of heads serves both sources.
    `reward, longer` goes on with twice as many prompts in a rollout. `reward, refined` reads everything by the
    allocation instead, in prompts of half the length. The supervised controls learn from the right answers.
    """
    folder = run_folder(control, source, seed)
    if checkpoint_of(control, source, seed).exists():
        return
    settings: dict[str, Any] = {"source": source, "attention_window": WINDOW, "num_sink_tokens": SINKS}
    options = {"model.init_args.model": model, "data.init_args.tokenizer": tokenizer}
    if control in (LONGER, REFINED):
        settings["init_from"] = str(checkpoint_of("reward", "none", seed))
    if control == LONGER:
        options["data.init_args.batch_size"] = "4"
    elif control == REFINED:
        settings |= {"prefill": "allocated", "lr": 0.1}
        options |= {"model.init_args.num_generations": "12", "data.init_args.task.init_args.length": "800"}
    options["seed_everything"] = str(seed)
    prompts = seed + LATER if control == LONGER else seed  # other prompts than before
    options |= {name: str(prompts) for name in ("data.init_args.seed", "model.init_args.seed")}
    options |= {"trainer.max_steps": str(STEPS[control]), "trainer.default_root_dir": str(folder)}
    objective = f"hybridmem.rl.{SUPERVISED.get(control, 'AllocationRL')}"
    options |= {OBJECTIVES: json.dumps([{"class_path": objective, "init_args": settings}])}
    started = newest_good(folder)
    options |= {} if started is None else {"ckpt_path": str(started)}
    folder.mkdir(parents=True, exist_ok=True)
    given = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "hybridmem", "fit", "--config", str(CONFIG), *given]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run_folder(control: str, source: str, seed: int) -> Path:
    """Return the folder of a run."""
    return ROOT / f"{control.replace(', ', '-')}-{source}" / str(seed)


def checkpoint_of(control: str, source: str, seed: int) -> Path:
    """Return the last checkpoint of a run."""
    return run_folder(control, source, seed) / f"step={STEPS[control]}.ckpt"


def order_of_heads(cell: Cell, shape: tuple[int, int]) -> Tensor:
    """Return the heads in the order in which a budget opens them."""
    count = shape[0] * shape[1]
    if cell.control in UNTRAINED:
        order = cell.control.replace(" ", "_")
        return FixedAllocation(order=order, seed=cell.seed, budget=1 - cell.closed).units_in_order(count)
    path = checkpoint_of(cell.control, cell.source if cell.control == REFINED else "none", cell.seed)
    logits = load_checkpoint(str(path))["state_dict"]["learned.Allocation.logits"]
    return logits.flatten().argsort(descending=True, stable=True)


def sources(cell: Cell, order: Tensor, shape: tuple[int, int]) -> list[list[str]]:
    """Return the sources of all heads."""
    opened = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    opened[order[: round((1 - cell.closed) * len(order))]] = True
    return [["full" if head else cell.source for head in layer] for layer in opened.view(shape).tolist()]


class Answers:
    """Rewards of greedy answers to held-out prompts of a task."""

    def __init__(self, model: HybridMemForCausalLM, tokenizer: Any, task: Facts | Ruler, length: int):
        self.model, self.tokenizer, self.task, self.length = model, tokenizer, task, length

    def __call__(self, first: int) -> list[float]:
        """Return the rewards of a block of prompts."""
        examples = [self.task.example("val", first + n) for n in range(BLOCK)]
        prompts = [example["prompt"] for example in examples]
        texts = answer(self.model, self.tokenizer, prompts, self.length)
        return self.task.reward(prompts, texts, [example["answer"] for example in examples])


class TextNats:
    """Nats per token of held-out text, beyond the first tokens of each row."""

    def __init__(self, model: HybridMemForCausalLM, tokenizer: Any, count: int):
        self.model, text = model, held_out_text(tokenizer, None, "*.py")
        starts = np.linspace(0, len(text) - TEXT_LENGTH, count).astype(int)
        self.rows = torch.tensor(np.stack([text[start : start + TEXT_LENGTH] for start in starts]).astype(np.int64))

    def __call__(self, first: int) -> list[float]:
        """Return the mean nats of each row of a block."""
        rows = self.rows[first : first + BLOCK]
        with evaluating(self.model):
            logits = self.model(rows, use_cache=False, logits_to_keep=TEXT_LENGTH - BEYOND).logits[:, :-1].float()
        nats = F.cross_entropy(logits.transpose(1, 2), rows[:, BEYOND + 1 :], reduction="none")
        return nats.mean(-1).tolist()


def prepare(model: HybridMemForCausalLM, tokenizer: Any, options: argparse.Namespace) -> Answers | TextNats:
    """Return the measurement of a block."""
    if options.task == "text":
        return TextNats(model, tokenizer, options.prompts)
    task = Facts(length=CHARACTERS[options.tokens], num_facts=4) if options.task == "facts" else Ruler(options.tokens)
    if isinstance(task, Ruler):
        task.measure_with(partial(count_tokens, tokenizer, True))
    return Answers(model, tokenizer, task, ANSWER_LENGTH[options.task])


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Yield the cells to measure: both ends first, then the arms by seed and share."""
    where = (TEXT_LENGTH if options.task == "text" else options.tokens, options.window, options.task)
    yield Cell("full", "none", 0.0, 0, *where)
    yield Cell("none", "none", 1.0, 0, *where)
    if options.memory:
        yield Cell("memory", "memory", 1.0, 0, *where)
    for seed in map(int, options.seeds.split(",")):
        for closed in map(float, options.closed.split(",")):
            for control in options.controls.split(";"):
                for source in options.sources.split(","):
                    if source == "none" or options.memory:
                        yield Cell(control, source, closed, seed, *where)


@torch.inference_mode()
def measure(options: argparse.Namespace) -> None:
    """Measure blocks until every cell has the requested number of values."""
    model = load_policy(options.memory or options.model)
    tokenizer = tokenizer_of_policy(options.model)
    model.config.attention_window, model.config.num_sink_tokens = options.window, SINKS
    lower_precision(model, "bfloat16")
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    measurement = prepare(model, tokenizer, options)
    for cell in cells(options):
        row = row_of(cell)
        if len(row["values"]) >= options.prompts:
            continue
        order = order_of_heads(cell, shape) if 0 < cell.closed < 1 else torch.arange(shape[0] * shape[1])
        chosen = sources(cell, order, shape)
        while len(row["values"]) < options.prompts:
            with model.head_sources(chosen):
                row["values"] += measurement(len(row["values"]))
            row[SCORES[options.task]] = sum(row["values"]) / len(row["values"])
            put_row(DATA, row, Cell._fields)
            print({name: value for name, value in row.items() if name != "values"}, len(row["values"]), flush=True)


def row_of(cell: Cell) -> dict[str, Any]:
    """Return a cell's row, empty if nothing was measured."""
    estimator = ("mixed" if cell.control in SUPERVISED else "sampled") if cell.trains else None
    return find_row(DATA, cell._asdict() | {"estimator": estimator, "values": []}, Cell._fields)


def curve(control: str, source: str, tokens: int, window: int, task: str) -> dict[float, list[float]]:
    """Return the score of each seed by the share closed, both ends included."""
    found: dict[float, list[float]] = {}
    for row in read_rows(DATA):
        end = row["closed"] == 0 or (row["closed"] == 1 and row["source"] == source)
        alike = row["control"] == control and row["source"] == source
        if (alike or end) and (row["task"], row["tokens"], row["window"]) == (task, tokens, window):
            found.setdefault(row["closed"], []).append(row[SCORES[task]])
    return dict(sorted(found.items()))


ARMS = {  # label: control, source of closed heads, colour
    "reward and memory": (LONGER, "memory", "#1f6f8b"),
    "reward alone": (LONGER, "none", "#c8553d"),
    "cross-entropy and memory": ("cross-entropy", "memory", "#8a6fb0"),
    "random heads and memory": ("random", "memory", "#999999"),
    "refined with memory": (REFINED, "memory", "#7fb3c4"),
    "refined alone": (REFINED, "none", "#e3a79a"),
    "cross-entropy alone": ("cross-entropy", "none", "#c3b4d9"),
    "random heads alone": ("random", "none", "#cccccc"),
    "last layers and memory": ("last layers", "memory", "#777777"),
    "last layers alone": ("last layers", "none", "#bbbbbb"),
}
DRAWN = 4  # the others are in the table alone


def figures(options: argparse.Namespace) -> None:
    """Print scores by the share of closed heads; for the task of training, draw the curve and the map of heads."""
    tokens = TEXT_LENGTH if options.task == "text" else options.tokens
    curves = {name: curve(*arm[:2], tokens, options.window, options.task) for name, arm in ARMS.items()}
    curves = {name: points for name, points in curves.items() if len(points) > 2}
    print("| closed | " + " | ".join(curves) + " |\n|" + " --- |" * (len(curves) + 1))
    for closed in sorted({share for points in curves.values() for share in points}):
        shown = (_shown(points.get(closed), options.task) for points in curves.values())
        print(f"| {closed:.0%} | " + " | ".join(shown) + " |")
    if (options.task, options.tokens, options.window) == ("facts", 400, WINDOW):
        _draw_curves(curves)
        _draw_map()


def _draw_curves(curves: dict[str, dict[float, list[float]]]) -> None:
    """Draw accuracy against the share of closed heads."""
    figure = Figure(figsize=(6.4, 4), layout="constrained", dpi=160)
    axes = figure.subplots()
    for name, (_, _, colour) in list(ARMS.items())[:DRAWN]:
        points = curves.get(name, {})
        if len(points) == 3:  # one share between the ends, which gives no curve
            points = {share: values for share, values in points.items() if 0 < share < 1}
        means = [100 * sum(values) / len(values) for values in points.values()]
        axes.plot([100 * share for share in points], means, "o-", label=name, color=colour)
    axes.set(xlabel=f"KV heads that read a window of {WINDOW} tokens (%)", ylabel="answers right (%)")
    axes.set_ylim(-3, 103)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE)


def overlap(options: argparse.Namespace) -> None:
    """Print how many heads each two orders open in common at a share closed, averaged over the pairs of their seeds."""
    closed = float(options.closed.split(",")[0])
    opened = {name: list(_opened(name, closed)) for name in (LONGER, *SUPERVISED, *UNTRAINED)}
    opened = {name: runs for name, runs in opened.items() if runs}
    count = len(opened["last layers"][0])
    print(f"{count} of {SHAPE[0] * SHAPE[1]} heads open; {count**2 / (SHAPE[0] * SHAPE[1]):.1f} in common by chance")
    print("| | " + " | ".join(opened) + " |\n|" + " --- |" * (len(opened) + 1))
    for name, runs in opened.items():
        print(f"| {name} | " + " | ".join(_in_common(runs, others) for others in opened.values()) + " |")


def _opened(control: str, closed: float) -> Iterator[set[int]]:
    """Yield the open heads of each seed of a control that has finished."""
    for seed in range(3):
        cell = Cell(control, "none", closed, seed, 400, WINDOW, "facts")
        if cell.trains and not checkpoint_of(control, "none", seed).exists():
            continue
        order = order_of_heads(cell, SHAPE)
        yield set(order[: round((1 - closed) * len(order))].tolist())


def _in_common(runs: list[set[int]], others: list[set[int]]) -> str:
    """Return the mean number of heads that two runs open in common; runs of one control are compared by pairs."""
    same = runs is others
    pairs = [(a, b) for i, a in enumerate(runs) for j, b in enumerate(others) if not same or i < j]
    return f"{sum(len(a & b) for a, b in pairs) / len(pairs):.1f}" if pairs else ""


def write_files(options: argparse.Namespace) -> None:
    """Write the allocations of the first seed as files for `hybridmem convert --allocation`."""
    found = load_checkpoint(str(checkpoint_of(LONGER, "none", 0)))["state_dict"]["learned.Allocation.logits"]
    shape = (found.shape[0], found.shape[1])
    for source in ("none", "memory"):
        for closed in map(float, options.closed.split(",")):
            cell = Cell(LONGER, source, closed, 0, options.tokens, options.window, "facts")
            trained = {
                "objective": "AllocationRL",
                "task": "Facts",
                "rollouts": STEPS["reward"] + STEPS[LONGER],
                "seed": 0,
                "accuracy": row_of(cell)["accuracy"],
                "command": "python scripts/results_allocation.py train --seeds 0",
            }
            chosen = sources(cell, order_of_heads(cell, shape), shape)
            file = FILES / f"smollm2_{source}_{round(100 * closed)}.json"
            Allocation("HuggingFaceTB/SmolLM2-135M-Instruct", WINDOW, SINKS, chosen, trained).save(file)


def _shown(values: list[float] | None, task: str) -> str:
    """Return the mean of seeds, with half its 95 % interval."""
    if not values:
        return ""
    mean, half = mean_interval(values)
    form = ".3f" if task == "text" else ".0%"
    return f"{mean:{form}}" if half is None else f"{mean:{form}} ± {half:{form}}"


def _draw_map() -> None:
    """Draw the probability of each head, averaged over the finished runs."""
    paths = list(ROOT.glob(f"reward-longer-*/*/step={STEPS[LONGER]}.ckpt"))
    if paths:
        logits = [load_checkpoint(str(path))["state_dict"]["learned.Allocation.logits"] for path in paths]
        draw_allocation(torch.stack(logits).sigmoid().mean(0)).savefig(MAP)


def main() -> None:
    """Train, measure or draw, as requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "measure", "figures", "overlap", "files"):
        command = commands.add_parser(name)
        command.add_argument(
            "--tokens", type=int, default=400, choices=CHARACTERS, help="approximate length of a prompt"
        )
        command.add_argument("--window", type=int, default=WINDOW)
        if name in ("measure", "figures"):
            command.add_argument("--task", default="facts", choices=list(SCORES))
        if name in ("measure", "overlap", "files"):
            command.add_argument("--closed", default="0.9,0.8,0.95,0.5", help="shares")
        if name in ("figures", "overlap", "files"):
            continue
        command.add_argument("--model", default="runs/smollm2", help="folder of `hybridmem convert`, with tokenizer")
        command.add_argument("--memory", help="a retrofitted model: a folder or checkpoint, for the source memory")
        command.add_argument("--controls", default=f"reward;{LONGER}", help="separated by semicolons")
        command.add_argument("--sources", default="none,memory")
        command.add_argument("--seeds", default="0,1,2")
        if name == "measure":
            command.add_argument("--prompts", type=int, default=128, help="or rows of text")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.command == "train":
        for seed in map(int, options.seeds.split(",")):
            for control in options.controls.split(";"):
                for source in options.sources.split(",") if control == REFINED else ["none"]:
                    model = options.model if source == "none" else options.memory
                    train(control, source, seed, model, options.model)
    elif options.command == "measure":
        measure(options)
    elif options.command == "overlap":
        overlap(options)
    elif options.command == "files":
        write_files(options)
    else:
        figures(options)


if __name__ == "__main__":
    main()
