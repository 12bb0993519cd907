"""Seconds per RL step, compared with TRL's GRPOTrainer on the same small Llama (extra `dev`).

    python scripts/bench_rl_step.py [--output docs/data/rl_step.json]

A step samples 4 answers of 32 tokens to each of 8 prompts and takes two optimiser steps on them (num_iterations=2),
because attention only differs from the rollout's after the first. All are timed in turn in one process; results are
medians.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from hybridmem.data import TaskDataModule, load_tokenizer
from hybridmem.rl import GRPO, AttentionRL
from hybridmem.tasks.task import Split
from hybridmem.training import PolicyModule, WarmupCosine

PROMPTS, GENERATIONS, LENGTH = 8, 4, 32
LLAMA = dict(
    vocab_size=259,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=256,
    bos_token_id=257,
    eos_token_id=258,
)


class Letters:
    """Task whose reward is the share of a letter in the answer."""

    @property
    def max_completion_length(self) -> int:
        """Number of tokens of an answer."""
        return LENGTH

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return a prompt that names a letter."""
        letter = "abcdefgh"[index % 8]
        return {"prompt": f"say {letter}: ", "answer": letter}

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return the share of the letter."""
        return [text.count(letter) / LENGTH for text, letter in zip(completions, answer, strict=True)]


class Clock(L.Callback):
    """Callback that records the seconds of every training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Record the seconds."""
        self.seconds.append(time.perf_counter() - self.started)


class TRLClock(TrainerCallback):
    """Callback that records the seconds from one rollout to the next."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the time of every second optimiser step, which begins with a rollout."""
        if state.global_step % 2 == 0:
            self.marks.append(time.perf_counter())


def ours(folder: str, steps: int, attention: bool) -> list[float]:
    """Return the seconds of hybridmem's steps."""
    objectives: list[Any] = [GRPO(beta=0.0)] + ([AttentionRL()] if attention else [])
    module = PolicyModule(
        folder,
        objectives,
        num_generations=GENERATIONS,
        num_iterations=2,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        lr_scheduler=lambda optimizer, total: WarmupCosine(optimizer, total, warmup_steps=1),
    )
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2 * steps,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=TaskDataModule(Letters(), batch_size=PROMPTS, mode="prompts"))
    return clock.seconds


def theirs(folder: str, steps: int) -> list[float]:
    """Return the seconds of TRL's steps."""

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [text.count(letter) / LENGTH for text, letter in zip(completions, answer, strict=True)]

    task = Letters()
    clock = TRLClock()
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=2 * steps + 1,
        per_device_train_batch_size=PROMPTS * GENERATIONS,
        num_generations=GENERATIONS,
        num_iterations=2,
        max_completion_length=LENGTH,
        learning_rate=1e-3,
        beta=0.0,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
        activation_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(folder),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list([task.example("train", index) for index in range(64)]),
        processing_class=load_tokenizer("bytes"),
        callbacks=[clock],
    )
    trainer.train()
    return [end - start for start, end in zip(clock.marks, clock.marks[1:], strict=False)]


def main() -> None:
    """Time all trainers in turn, print the comparison and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps per round; the first one is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # TRL's and Lightning's advice for long runs
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    seconds: dict[str, list[float]] = {"TRL": [], "tokens": [], "tokens and attention": []}
    for _ in range(arguments.rounds):
        seconds["TRL"] += theirs(folder, arguments.steps)[1:]
        seconds["tokens"] += ours(folder, arguments.steps, attention=False)[1:]
        seconds["tokens and attention"] += ours(folder, arguments.steps, attention=True)[1:]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:22} {median:.4f} s   {median / medians['TRL']:.2f} x TRL")
    if arguments.output:
        settings = dict(threads=arguments.threads, prompts=PROMPTS, num_generations=GENERATIONS, tokens=LENGTH)
        figures = {name: round(median, 4) for name, median in medians.items()}
        arguments.output.write_text(json.dumps({"settings": settings, "seconds": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
