"""Measurements of a model at one length: the score of each task, with the time and bytes of reading."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import Any

import numpy as np
import torch

from hybridmem.data.corpora import list_documents, split_documents
from hybridmem.data.tokenizer import token_byte_lengths
from hybridmem.data.tokens import tokenize
from hybridmem.metrics.bits import BitsPerByte, LossByPosition
from hybridmem.tasks import Facts, NeedleRows, Ruler, Task
from hybridmem.tasks.ruler import SUBTASKS

from .cells import LOSS, Cell
from .harness import PREFIX, HarnessTask
from .reader import Reader, Usage

Probe = Callable[[], Cell]  # measures a cell
RULER, NEEDLE, FACTS = "ruler", "needle", "facts"
NAMES = (RULER, NEEDLE, LOSS, FACTS)
VAL_FRACTION = 0.05  # of the text, as in TextDataModule
FIRST_EDGE = 256  # tokens; further ranges of positions are four times as long each
FACTS_ROUNDS = 8
FACTS_SHARE = 0.98  # of the length that a prompt of Facts should fill: its text is measured in characters


@dataclass
class Probes:
    """Measurements of a reader.

    Args:
        reader: reader of the model.
        model: the model's folder or name.
        num_samples: number of prompts or rows in a cell.
        max_new_tokens: maximum number of tokens in an answer.
        seed: seed of all examples.
        path: file or folder of text; None: the standard library.
        pattern: pattern of the files to read in a folder.
    """

    reader: Reader
    model: str
    num_samples: int
    max_new_tokens: int
    seed: int
    path: str | None
    pattern: str

    def probe(self, name: str, length: int) -> Probe:
        """Prepare a measurement, and check its settings.

        Raises:
            ValueError: the task does not support this length.
        """
        if name == NEEDLE:
            return self.needle(length)
        if name == LOSS:
            return self.loss_by_position(length)
        if name.startswith(PREFIX):
            harness = HarnessTask(name.removeprefix(PREFIX), length, self.model, self.num_samples, self.seed)
            return lambda: harness.measure(self.reader)
        task: Task
        if name == FACTS:
            task = sized_facts(length, self.reader.count, self.seed, self.path, self.pattern)
        else:
            task = self.ruler(name.split("/")[1], length)
        return lambda: self.answers(task, first_line=name == FACTS and not self.reader.chat)

    def ruler(self, subtask: Any, length: int) -> Ruler:
        """Return a subtask of RULER with prompts of `length` tokens."""
        begin = not self.reader.chat
        task = Ruler(length, [subtask], begin_answer=begin, path=self.path, pattern=self.pattern, seed=self.seed)
        task.measure_with(self.reader.count)
        return task

    def answers(self, task: Task, first_line: bool) -> Cell:
        """Answer a task's held-out prompts; the score is the mean reward, optionally of the first line alone."""
        rows, usages, seconds = [], [], []
        for index in range(self.num_samples):
            example = task.example("val", index)
            tokens = min(self.max_new_tokens, task.max_completion_length)
            answer = self.reader.answer(self.reader.prompt(example["prompt"]), tokens)
            columns = {name: [value] for name, value in example.items() if name != "prompt"}
            said = answer.text.strip().partition("\n")[0] if first_line else answer.text
            (reward,) = task.reward([example["prompt"]], [said], **columns)
            rows.append({"answer": example["answer"], "completion": answer.text, "score": reward})
            usages.append(answer.usage)
            seconds.append(answer.seconds_per_token)
        score = mean(row["score"] for row in rows)
        return {"score": score, **_costs(usages), "seconds_per_new_token": mean(seconds), "samples": rows}

    def needle(self, length: int) -> Probe:
        """Prepare needles in held-out text; the score is the share that the model predicts token by token."""
        try:
            rows = NeedleRows(self.text, self.reader.tokenizer, length, num_rows=self.num_samples, seed=self.seed)
        except ValueError as error:
            raise ValueError(f"lengths={length} for task {NEEDLE}: {error}") from error

        def measure() -> Cell:
            samples, usages = [], []
            for index in range(len(rows)):
                row = rows[index]
                _, hits, usage = self.reader.predict(row["input_ids"], row["shift_labels"])
                samples.append({"depth": (index + 0.5) / len(rows), "score": float(hits.all())})
                usages.append(usage)
            return {"score": mean(row["score"] for row in samples), **_costs(usages), "samples": samples}

        return measure

    def loss_by_position(self, length: int) -> Probe:
        """Prepare rows of held-out text; the score is the bits per byte of their second half.

        Raises:
            ValueError: the text is shorter than a row.
        """
        if len(self.text) <= length:
            raise ValueError(
                f"lengths={length} for task {LOSS}: the held-out text has {len(self.text)} tokens: lower lengths, or "
                "set path to a folder with more text"
            )
        starts = np.linspace(0, len(self.text) - length - 1, self.num_samples).astype(int).tolist()
        edges = [0, *(FIRST_EDGE * 4**n for n in range(10) if FIRST_EDGE * 4**n < length)]

        def measure() -> Cell:
            by_position, second_half, usages = LossByPosition(edges), BitsPerByte(), []
            positions = torch.arange(length)
            for start in starts:
                tokens = torch.tensor(self.text[start : start + length + 1].astype(np.int64))
                nats, _, usage = self.reader.predict(tokens[:-1], tokens[1:])
                num_bytes = self.byte_lengths[tokens[1:]]
                by_position.update(nats, num_bytes, positions)
                second_half.update(nats[length // 2 :], num_bytes[length // 2 :])
                usages.append(usage)
            ranges = {name: float(bits) for name, bits in by_position.compute().items()}
            return {"score": float(second_half.compute()), **_costs(usages), "by_position": ranges}

        return measure

    @cached_property
    def text(self) -> np.ndarray:
        """Tokens of held-out text."""
        return held_out_text(self.reader.tokenizer, self.path, self.pattern)

    @cached_property
    def byte_lengths(self) -> torch.Tensor:
        """Bytes of each token."""
        return token_byte_lengths(self.reader.tokenizer)


def sized_facts(
    length: int, count: Callable[[str], int], seed: int, path: str | None = None, pattern: str = "*.py"
) -> Facts:
    """Return Facts with prompts of slightly fewer than `length` tokens.

    Raises:
        ValueError: the facts alone make a prompt longer than this.
    """
    characters = 4 * length
    for _ in range(FACTS_ROUNDS):
        try:
            task = Facts(characters, path=path, pattern=pattern, seed=seed)
        except ValueError as error:
            if "is too short" not in str(error):
                raise
            raise ValueError(f"lengths: {length} tokens are too short for task {FACTS}: raise lengths") from error
        tokens = count(task.example("val", 0)["prompt"])
        if 2 * FACTS_SHARE - 1 <= tokens / length <= 1:
            break
        characters = round(characters * FACTS_SHARE * length / tokens)
    return task


def held_out_text(tokenizer: Any, path: str | None, pattern: str) -> np.ndarray:
    """Return the tokens of TextDataModule's validation documents for a path."""
    _, held_out = split_documents(list_documents(path, pattern=pattern), VAL_FRACTION, 0)
    return tokenize(held_out, tokenizer, "replace").text


def expand(tasks: list[str]) -> list[str]:
    """Return the rows of a table: one for each task, and one for each subtask of RULER.

    Raises:
        ValueError: a name is unknown.
    """
    rows: list[str] = []
    for name in tasks:
        if name.startswith(PREFIX):
            rows.append(name)
            continue
        known = [*NAMES, *(f"{RULER}/{subtask}" for subtask in SUBTASKS)]
        if name not in known:
            raise ValueError(f"tasks: {name!r} is unknown; choose among {', '.join(known)}, or lm_eval/NAME")
        rows += [f"{RULER}/{subtask}" for subtask in SUBTASKS] if name == RULER else [name]
    return list(dict.fromkeys(rows))


def _costs(usages: list[Usage]) -> Cell:
    return {
        "tokens": mean(usage.tokens for usage in usages),
        "seconds": mean(usage.seconds for usage in usages),
        "state_bytes": max(usage.state_bytes for usage in usages),
        "bytes_per_token": max(usage.growth for usage in usages),
    }
