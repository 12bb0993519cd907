"""Trains a byte-level BPE tokenizer of configs/tokenizers on a task's training examples.

    python scripts/train_tokenizer.py docstrings        for configs/rl/query.yaml, in lower case
    python scripts/train_tokenizer.py calls             for configs/rl/workspace.yaml, with separate spaces and signs
    python scripts/train_tokenizer.py source            for configs/rl/identifier.yaml, with indentation as one token

All 256 bytes are tokens, so any text can be encoded.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hybridmem.data.tokenizer import BOS, EOS, PAD
from hybridmem.tasks import Identifier, Query, Workspace
from hybridmem.tasks.task import Task

EXAMPLES = 40_000
ROOT = Path("configs/tokenizers")


@dataclass
class Recipe:
    """Training data and pre-tokenisation of a tokenizer."""

    task: Callable[[], Task]
    vocab_size: int
    lower_case: bool = False
    words: str | None = None  # regular expression; None: GPT-2's


# A name has the same tokens after a space and at the start of a line, so that copies look alike.
RECIPES = {
    "docstrings": Recipe(lambda: Query(every_line=True), 2048, lower_case=True),
    "calls": Recipe(lambda: Workspace(num_files=8, search=True), 1024, words=r"[A-Za-z]+|[^A-Za-z]"),
    "source": Recipe(lambda: Identifier(window=128, context_length=448), 2048, words=r"[A-Za-z]+|\s+|[^A-Za-z\s]"),
}


def main() -> None:
    """Train a tokenizer on training examples only, without held-out ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=RECIPES)
    name = parser.parse_args().name
    recipe = RECIPES[name]

    task = recipe.task()
    tokenizer = Tokenizer(models.BPE())
    if recipe.lower_case:
        tokenizer.normalizer = normalizers.Lowercase()
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=recipe.words is None)
    split = [] if recipe.words is None else [pre_tokenizers.Split(Regex(recipe.words), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, in_bytes]) if split else in_bytes
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PAD, BOS, EOS]
    trainer = trainers.BpeTrainer(vocab_size=recipe.vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator((text(task.example("train", index)) for index in range(EXAMPLES)), trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="left"
    )
    whole.save_pretrained(ROOT / name)
    print(f"wrote {ROOT / name}: {len(whole):,} tokens")


def text(example: dict[str, Any]) -> str:
    """Return all text of an example that the policy reads or writes."""
    if "turns" not in example:
        return str(example["prompt"] + example["answer"])
    return str(example["prompt"]) + "".join(f"{said}\n{observation}\n" for said, observation in example["turns"])


if __name__ == "__main__":
    main()
