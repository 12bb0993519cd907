"""Retrofits SmolLM2, and measures nats beyond the window, exact answers, state bytes and time.

    python scripts/results_retrofit.py train [--base BASE] [--cells "plain;depth 2"] [--stages "regression;lora"]
    python scripts/results_retrofit.py measure [--cells plain] [--stages regression] [--seeds 0,1,2]
    python scripts/results_retrofit.py write
    python scripts/results_retrofit.py curve

`train` runs the configs of the stages with the changes of each cell, one run after another; it resumes interrupted runs
and skips finished ones. `measure` adds the results of each finished run to docs/data/retrofit.json, with the nats of
every hundredth step, and of full attention and the window alone. `write` writes the tables of
docs/results/retrofit.md. `curve` draws the recovered nats by step.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from greedy_answers import answer
from matplotlib.figure import Figure
from measured import find_row, key, put_row, read_rows
from tables import Table, mean_and_half, write_tables
from transformers import DynamicCache, PreTrainedTokenizerBase

from hybridmem.data import TextDataModule
from hybridmem.data.task_module import chat_tokens
from hybridmem.model.cache import state_bytes
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.rl.rollouts.policy import lower_precision
from hybridmem.tasks import Facts
from hybridmem.training.checkpoints.contents import load_policy, tokenizer_of_policy
from hybridmem.training.checkpoints.durable import to_go_on_from
from hybridmem.training.retrofit_losses import beyond_window, every_source, nats_beyond, read

ROOT = Path("runs/results_retrofit")
DATA = Path("docs/data/retrofit.json")
FIGURE = Path("docs/results/retrofit.png")
CELLS: dict[str, dict[str, Any]] = {  # changes of RetrofitModule's settings
    "plain": {},
    "window 256": {"attention_window": 256},
    "no forgetting": {"memory": {"memory_forgetting": False}},
    "no momentum": {"memory": {"memory_momentum": False}},
    "no feature maps": {"frozen": ["q_map.*", "k_map.*"]},
    "constant mixing gate": {"frozen": ["mixing_gate.weight", "window_mass"]},
    "depth 2": {"memory": {"memory_depth": 2}},
}
FROZEN = "frozen"  # a change that later stages repeat


class Stage(NamedTuple):
    """A run of one config after the run of another stage."""

    config: Path
    steps: int
    after: str | None = None
    lora: dict[str, Any] | None = None


KL = Path("configs/retrofit/smollm2_kl.yaml")
REGRESSION = Path("configs/retrofit/smollm2.yaml")
STAGES = {
    "short": Stage(REGRESSION, 100),  # for ablations
    "regression": Stage(REGRESSION, 300),
    "kl": Stage(KL, 100, "regression"),
    "lora": Stage(KL, 400, "regression", {"r": 8, "lora_alpha": 16}),
}
ENDS = {"full": "full", "window": "none"}  # source of all heads, without memories
LENGTHS = {400: 1600, 1000: 4000, 4000: 16000}  # approximate tokens and characters of a prompt
BLOCK = {400: 16, 1000: 8, 4000: 1}  # prompts at a time
MAX_NEW_TOKENS = 20
KEY = ("window", "cell", "stage", "seed")  # of a row in DATA
EVERY = 100  # steps between the points of a curve
WINDOW = 64  # of the figure, and of the table of costs
COLOURS = {"regression": "#c8553d", "kl": "#7fb3c4", "lora": "#1f6f8b"}
COSTS = (("", "full"), ("", "window"), ("regression", "plain"), ("lora", "plain"))
TIMED = 2  # prompts whose answers are timed, one token at a time


class Run(NamedTuple):
    """A cell, a stage and a seed; full attention and the window alone are cells without a stage."""

    cell: str
    stage: str
    seed: int

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return ROOT / self.cell.replace(" ", "_") / self.stage / str(self.seed)

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint of the run."""
        return self.at(STAGES[self.stage].steps)

    def at(self, step: int) -> Path:
        """Return the checkpoint of a step."""
        return self.folder / f"step={step}.ckpt"


def train(run: Run, base: str) -> None:
    """Train a cell's stage with a seed, after the stage before it; resume an interrupted run."""
    if run.checkpoint.exists():
        return
    stage = STAGES[run.stage]
    if stage.after is not None:
        train(run._replace(stage=stage.after), base)
    run.folder.mkdir(parents=True, exist_ok=True)
    config = run.folder / "given.yaml"
    config.write_text(yaml.safe_dump(settings(run, base), sort_keys=False))
    started = to_go_on_from(run.folder)
    resume = [] if started is None else ["--ckpt_path", str(started)]
    command = [sys.executable, "-m", "hybridmem", "fit", "--config", str(config), *resume]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def settings(run: Run, base: str) -> dict[str, Any]:
    """Return the config of a run."""
    stage = STAGES[run.stage]
    config = yaml.safe_load(stage.config.read_text())
    seed = run.seed if stage.after is None else run.seed + 10  # other texts than in the stage before
    config["seed_everything"] = config["data"]["init_args"]["seed"] = seed
    for part in config["data"]["init_args"]["parts"]:
        part["init_args"] |= {"seed": seed, "tokenizer": base}
    config["trainer"] |= {"max_steps": stage.steps, "default_root_dir": str(run.folder), "limit_val_batches": 0}
    changes = CELLS[run.cell]
    if stage.after is None:
        config["model"]["init_args"] |= changes | {"base": base}
    else:
        before = run._replace(stage=stage.after).checkpoint
        kept = {FROZEN: changes[FROZEN]} if FROZEN in changes else {}
        config["model"]["init_args"] |= kept | {"base": str(before)}
    if stage.lora is not None:
        config["model"]["init_args"]["lora"] = stage.lora
    return config


class Measurement:
    """Nats, answers, state and times of a model under one source of all heads, or under its own sources."""

    def __init__(self, model: HybridMemForCausalLM, tokenizer: PreTrainedTokenizerBase, source: str | None):
        self.model, self.tokenizer = model, tokenizer
        self.sources = None if source is None else every_source(model, source)

    def nats(self, rows: int) -> dict[str, float]:
        """Return nats per token of held-out source beyond window and sinks, and beyond 128 tokens.

        The rows of 512 tokens are evenly spaced in 200 kB of the standard library's held-out files.
        """
        reach = self.model.config.attention_window + self.model.config.num_sink_tokens
        totals = [[0.0, 0] for _ in range(2)]
        for batch in held_out_rows(self.tokenizer.name_or_path, rows):
            hidden = read(self.model, batch, self.sources)
            for total, start in zip(totals, (reach, max(reach, 128)), strict=True):
                counted = beyond_window(batch["document_ids"], start) & (batch["shift_labels"] >= 0)
                nats = nats_beyond(self.model, hidden, batch["shift_labels"], counted)
                total[0] += float(nats.double().sum())
                total[1] += len(nats)
        return dict(zip(("beyond window", "beyond 128"), (sum_ / count for sum_, count in totals), strict=True))

    def exact(self, length: int, count: int) -> dict[str, Any]:
        """Return the share of exactly answered held-out prompts with four facts, and the cost of some answers."""
        task = Facts(length=LENGTHS[length])
        examples = [task.example("val", index) for index in range(count)]
        rewards: list[float] = []
        with self.model.head_sources(self.sources):
            for first in range(0, count, BLOCK[length]):
                block = examples[first : first + BLOCK[length]]
                prompts = [example["prompt"] for example in block]
                texts = answer(self.model, self.tokenizer, prompts, MAX_NEW_TOKENS)
                rewards += task.reward(prompts, texts, [example["answer"] for example in block])
            costs = [self.cost(chat_tokens(self.tokenizer, example["prompt"])) for example in examples[:TIMED]]
        means = {name: sum(cost[name] for cost in costs) / len(costs) for name in costs[0]}
        return {"exact": sum(rewards) / count, "prompts": count, **means}

    def cost(self, prompt: list[int]) -> dict[str, float]:
        """Return the seconds to read a prompt, the state's bytes after it, and the seconds of a token."""
        cache = DynamicCache(config=self.model.config)
        started = time.perf_counter()
        token = self.model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        seconds, size = time.perf_counter() - started, state_bytes(cache)
        started = time.perf_counter()
        for _ in range(MAX_NEW_TOKENS):
            token = self.model(token, past_key_values=cache).logits.argmax(-1)
        each = (time.perf_counter() - started) / MAX_NEW_TOKENS
        return {"tokens": len(prompt), "read seconds": seconds, "seconds per token": each, "state bytes": size}


@cache
def held_out_rows(tokenizer: str, count: int) -> list[dict[str, Any]]:
    """Return rows of 512 tokens, evenly spaced in the standard library's held-out files."""
    data = TextDataModule(
        tokenizer=tokenizer,
        sequence_length=512,
        batch_size=1,
        max_bytes=100_000,
        max_val_bytes=200_000,
        encoding_errors="replace",
    )
    data.setup("validate")
    batches = list(data.val_dataloader())
    return [batches[n * len(batches) // count] for n in range(count)]


@torch.inference_mode()
def measure(run: Run, options: argparse.Namespace) -> None:
    """Measure a finished run, and both ends with its window, unless their results exist."""
    counts = dict(zip(LENGTHS, map(int, options.prompts.split(",")), strict=True))
    model, tokenizer = load(run.checkpoint)
    window = model.config.attention_window
    ends = ENDS if STAGES[run.stage].lora is None else {}  # adapters change full attention
    for name, source in {**ends, run.cell: None}.items():
        row = row_of(window, run if source is None else Run(name, "", 0))
        measurement = Measurement(model, tokenizer, source)
        if "nats" not in row:
            row["nats"] = measurement.nats(options.rows)
            put_row(DATA, row, KEY)
        for length, count in counts.items():
            if count and str(length) not in row["answers"]:
                row["answers"][str(length)] = measurement.exact(length, count)
                put_row(DATA, row, KEY)
        print(row, flush=True)
    row = row_of(window, run)
    row.setdefault("by step", {})
    for step in range(EVERY, STAGES[run.stage].steps, EVERY):
        if str(step) not in row["by step"]:
            row["by step"][str(step)] = Measurement(*load(run.at(step)), None).nats(options.rows)
            put_row(DATA, row, KEY)


def load(checkpoint: Path) -> tuple[HybridMemForCausalLM, PreTrainedTokenizerBase]:
    """Return the model of a checkpoint in bfloat16, and its tokenizer."""
    model, tokenizer = load_policy(str(checkpoint)), tokenizer_of_policy(str(checkpoint))
    assert tokenizer is not None
    lower_precision(model, "bfloat16")
    return model.eval(), tokenizer


def row_of(window: int, run: Run) -> dict[str, Any]:
    """Return a run's row, empty if nothing was measured."""
    return find_row(DATA, {"window": window, **run._asdict(), "answers": {}}, KEY)


def recovered(row: dict[str, Any], nats: dict[str, float], name: str) -> float:
    """Return the share of the nats between window and full attention that a row's model recovers."""
    ends = {each["cell"]: each for each in read_rows(DATA) if each["window"] == row["window"] and each["cell"] in ENDS}
    if missing := ENDS.keys() - ends.keys():
        names = " and ".join(sorted(missing))
        raise SystemExit(f"{names} with window {row['window']} not measured; measure stage regression first")
    full, window = ends["full"]["nats"][name], ends["window"]["nats"][name]
    return (window - nats[name]) / (window - full)


def likelihoods() -> Table:
    """Return the table of nats, with intervals over seeds."""
    names = ("beyond window", "beyond 128")
    table = [["model", "window", "seeds", "nats", "recovered", "beyond 128", "recovered"]]
    for (window, cell, stage), group in grouped():
        table.append([" ".join((cell, stage)).strip(), str(window), str(len(group))])
        for name in names:
            table[-1].append(mean_and_half([row["nats"][name] for row in group]))
            table[-1].append(f"{mean_and_half([100 * recovered(row, row['nats'], name) for row in group], 0)} %")
    return table


def exact_answers() -> Table:
    """Return the table of right answers, with intervals over seeds, for models that answered."""
    table = [["model", "window", *(f"{length:,} tokens" for length in LENGTHS)]]
    for (window, cell, stage), group in grouped():
        answers = [shown_answers([row["answers"].get(str(length)) for row in group]) for length in LENGTHS]
        if any(answers):
            table.append([" ".join((cell, stage)).strip(), str(window), *answers])
    return table


def grouped() -> Iterator[tuple[tuple[int, str, str], list[dict[str, Any]]]]:
    """Yield the rows of all seeds by window, cell and stage: both ends, then the order of CELLS and STAGES."""
    for window in sorted({row["window"] for row in read_rows(DATA)}):
        for cell in (*ENDS, *CELLS):
            for stage in ("", *STAGES):
                group = [row for row in read_rows(DATA) if key(row, KEY[:3]) == (window, cell, stage)]
                if group:
                    yield (window, cell, stage), group


def shown_answers(answers: list[dict[str, Any] | None]) -> str:
    """Return the mean share of right answers, or nothing if no seed has any."""
    found = [100 * each["exact"] for each in answers if each]
    return f"{mean_and_half(found, 0)} %" if found else ""


def costs() -> Table:
    """Return the table of states and times of full attention, the window and the plain memories of the first seed."""
    table = [["model", "tokens", "state", "s for the prompt", "ms per token after it"]]
    for (window, cell, stage), group in grouped():
        for cost in group[0]["answers"].values() if window == WINDOW and (stage, cell) in COSTS else ():
            figures = [f"{cost['state bytes'] / 1e6:.1f} MB", f"{cost['read seconds']:.1f}"]
            figures.append(f"{1000 * cost['seconds per token']:.0f}")
            table.append([" ".join((cell, stage)).strip(), f"{cost['tokens']:,.0f}", *figures])
    return table


def curve() -> None:
    """Draw the share of the nats beyond the window that each seed recovers, by step."""
    figure = Figure(figsize=(6.4, 4), layout="constrained", dpi=160)
    axes = figure.subplots()
    for (window, cell, stage), group in grouped():
        for row in group if (window, cell) == (WINDOW, "plain") and stage in COLOURS else ():
            begun = STAGES["regression"].steps if STAGES[stage].after else 0
            points = {**row.get("by step", {}), STAGES[stage].steps: row["nats"]}
            steps = [begun + int(step) for step in points]
            shares = [100 * recovered(row, nats, "beyond window") for nats in points.values()]
            label = stage if row is group[0] else None
            axes.plot(steps, shares, "o-", color=COLOURS[stage], label=label)
    axes.set(xlabel="steps of one text or prompt", ylabel="nats recovered (%)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE)


def main() -> None:
    """Train, measure, write or draw, as requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "measure"):
        command = commands.add_parser(name)
        command.add_argument("--cells", default="plain", help=f"separated by semicolons: {'; '.join(CELLS)}")
        command.add_argument(
            "--stages", default="regression;kl;lora", help=f"separated by semicolons: {'; '.join(STAGES)}"
        )
        command.add_argument("--seeds", default="0,1,2")
        if name == "train":
            command.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="name or folder")
        else:
            command.add_argument("--rows", type=int, default=40, help="number of rows of held-out text")
            command.add_argument(
                "--prompts", default="64,32,16", help="number of prompts of 400, 1,000 and 4,000 tokens"
            )
    commands.add_parser("write")
    commands.add_parser("curve")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.command == "write":
        write_tables("retrofit", [likelihoods(), exact_answers(), costs()])
    elif options.command == "curve":
        curve()
    else:
        for seed in map(int, options.seeds.split(",")):
            for cell in options.cells.split(";"):
                for stage in options.stages.split(";"):
                    run = Run(cell, stage, seed)
                    train(run, options.base) if options.command == "train" else measure(run, options)


if __name__ == "__main__":
    main()
