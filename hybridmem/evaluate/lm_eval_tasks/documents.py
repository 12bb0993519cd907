"""Documents of the tasks in this folder, generated locally from lm-eval's metadata.

The metadata may have `max_seq_lengths` (tokens per document), `num_samples` (per length), `seed`, `subtasks` (of
Ruler), and `tokenizer` or `pretrained`, the folder or name of the tokenizer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import Dataset

from hybridmem.data.task_module import count_tokens
from hybridmem.data.tokenizer import load_tokenizer
from hybridmem.evaluate.probes import held_out_text, sized_facts
from hybridmem.tasks import NeedleRows, Ruler
from hybridmem.tasks.ruler.ruler import expected
from hybridmem.tasks.ruler.scoring import string_match_all

Documents = dict[str, Dataset]
Make = Callable[[Any, int, int, int], list[dict[str, Any]]]  # tokenizer, length, number of documents, seed
LENGTHS = tuple(str(1 << power) for power in range(9, 21))  # the metrics that the tasks declare


def ruler(subtasks: list[str] | None = None, **metadata: Any) -> Documents:
    """Return prompts of Ruler, cycling through the subtasks."""

    def make(tokenizer: Any, length: int, count: int, seed: int) -> list[dict[str, Any]]:
        task = Ruler(length, subtasks, begin_answer=True, seed=seed)  # type: ignore[arg-type]
        task.measure_with(partial(count_tokens, tokenizer, False))
        rows = [task.example("val", index) for index in range(count)]
        split = [row["prompt"].rsplit("\n", 1) for row in rows]
        return [
            {"input": text, "prefix": prefix, "outputs": expected(row["answer"])}
            for (text, prefix), row in zip(split, rows, strict=True)
        ]

    return _documents(make, metadata)


def facts(**metadata: Any) -> Documents:
    """Return prompts of Facts."""

    def make(tokenizer: Any, length: int, count: int, seed: int) -> list[dict[str, Any]]:
        task = sized_facts(length, partial(count_tokens, tokenizer, False), seed)
        rows = [task.example("val", index) for index in range(count)]
        return [{"input": row["prompt"], "prefix": "", "outputs": [row["answer"]]} for row in rows]

    return _documents(make, metadata)


def needle(**metadata: Any) -> Documents:
    """Return needles in held-out text, with the value as the target."""

    def make(tokenizer: Any, length: int, count: int, seed: int) -> list[dict[str, Any]]:
        rows = NeedleRows(held_out_text(tokenizer, None, "*.py"), tokenizer, length, num_rows=count, seed=seed)
        made = []
        for row in map(rows.__getitem__, range(count)):
            answer = row["shift_labels"] >= 0
            text = row["input_ids"][: int((~answer).sum()) + 1]
            made.append(
                {"input": _decode(tokenizer, text), "outputs": [_decode(tokenizer, row["shift_labels"][answer])]}
            )
        return made

    return _documents(make, metadata)


def loss_by_position(**metadata: Any) -> Documents:
    """Return rows of held-out text."""

    def make(tokenizer: Any, length: int, count: int, seed: int) -> list[dict[str, Any]]:
        text = held_out_text(tokenizer, None, "*.py")
        starts = [index * (len(text) - length) // max(1, count - 1) for index in range(count)]
        return [{"input": _decode(tokenizer, text[start : start + length].tolist())} for start in starts]

    return _documents(make, metadata)


def match_all(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return RULER's score under the document's length."""
    return {str(doc["length"]): string_match_all(results[0], doc["outputs"])}


def match_exactly(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a completion under the document's length: 1 if it is the answer, otherwise 0."""
    return {str(doc["length"]): float(results[0].strip() == doc["outputs"][0])}


def match_greedily(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Score a document under its length: 1 if greedy decoding gives the target, otherwise 0."""
    return {str(doc["length"]): float(results[0][1])}


def _documents(make: Make, metadata: dict[str, Any]) -> Documents:
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not isinstance(name, str):
        raise ValueError("metadata names no tokenizer: give --model_args pretrained=FOLDER, or its key tokenizer")
    lengths = metadata.get("max_seq_lengths", [4096])
    other = [length for length in lengths if str(length) not in LENGTHS]
    if other:
        raise ValueError(f"max_seq_lengths={other[0]} is not a metric of this task: choose among {', '.join(LENGTHS)}")
    tokenizer, count, seed = load_tokenizer(name), metadata.get("num_samples", 20), metadata.get("seed", 0)
    rows = [{**row, "length": length} for length in lengths for row in make(tokenizer, length, count, seed)]
    return {"test": Dataset.from_list(rows)}


def _decode(tokenizer: Any, tokens: Any) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
