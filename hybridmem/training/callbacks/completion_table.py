"""Tables of completions and their rewards."""

import json
from pathlib import Path

import lightning as L

from hybridmem.training.policy.module import PolicyModule
from hybridmem.training.trackers import log_table

from .policy_probe import is_due

Sample = tuple[str, str, float]  # prompt, completion, reward
COLUMNS = ("prompt", "completion", "reward")


class CompletionTable(L.Callback):
    """Callback that logs the last rollout's completions at regular steps, like TRL's log_completions.

    TensorBoard, Weights & Biases and MLflow show the first completions as a table, TensorBoard with ↵ for line breaks.
    completions.jsonl in trainer.default_root_dir holds all of them, one per line: step, prompt, completion, reward. A
    resumed run appends the steps that it repeats. In a distributed run, only rank 0 logs its completions.

    Args:
        every_n_steps: optimiser steps between two tables.
        num_rows: number of completions in the table.

    Raises:
        ValueError: a setting is below 1, or, before the first batch, the module does not sample.
    """

    def __init__(self, every_n_steps: int = 50, num_rows: int = 16):
        if every_n_steps < 1 or num_rows < 1:
            raise ValueError(f"every_n_steps={every_n_steps} and num_rows={num_rows} must be at least 1")
        self.every_n_steps, self.num_rows = every_n_steps, num_rows
        self.previous_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the current step."""
        if not isinstance(pl_module, PolicyModule):
            raise ValueError(f"CompletionTable supports PolicyModule, not {type(pl_module).__name__}; remove it")
        self.previous_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: PolicyModule, *_: object) -> None:
        """Write the tables every `every_n_steps` optimiser steps."""
        step, previous = trainer.global_step, self.previous_step
        self.previous_step = step
        if not is_due(step, previous, self.every_n_steps) or not trainer.is_global_zero:
            return
        samples = pl_module.worker.last_responses
        append_jsonl(Path(trainer.default_root_dir) / "completions.jsonl", step, samples)
        log_table(trainer.loggers, "completions", COLUMNS, samples[: self.num_rows], step)


def append_jsonl(path: Path, step: int, samples: list[Sample]) -> None:
    """Append a line for each sample."""
    rows = [dict(step=step, prompt=p, completion=c, reward=r) for p, c, r in samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
