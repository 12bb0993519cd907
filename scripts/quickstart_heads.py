"""Held-out answers of a model with all heads, with the heads chosen by reward, and with random ones."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from greedy_answers import answer
from transformers import DynamicCache

from hybridmem.convert import Allocation
from hybridmem.model.cache import state_bytes
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.rl import FixedAllocation
from hybridmem.rl.rollouts.policy import lower_precision
from hybridmem.tasks import Facts
from hybridmem.training.checkpoints.contents import tokenizer_of_policy

BLOCK = 16  # prompts at a time
ANSWER_LENGTH = 16  # tokens
CACHED = 4000  # tokens in the caches that are compared
PIECE = 256  # tokens of a forward pass that fills a cache
NUMBERS = ("", "", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Arm:
    """Answers under one choice of heads, with the bytes of the KV cache."""

    name: str
    opened: int  # heads that read everything
    heads: int
    cache: float  # bytes at CACHED tokens
    texts: list[str]
    right: list[bool]

    @property
    def accuracy(self) -> float:
        """Return the share of right answers."""
        return sum(self.right) / len(self.right)


def choices(allocation: Allocation) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield each arm's name with the sources of its heads; there are as many random heads as learned ones."""
    rows = allocation.head_sources
    shape, heads = [len(row) for row in rows], sum(map(len, rows))
    opened = sum(row.count("full") for row in rows)
    yield "all heads", [["full"] * size for size in shape]
    yield "learned heads", rows
    order = FixedAllocation(order="random", seed=0, budget=opened / heads).units_in_order(heads)
    chosen = set(order[:opened].tolist())
    places = iter(range(heads))
    yield "random heads", [["full" if next(places) in chosen else "none" for _ in range(size)] for size in shape]


@torch.inference_mode()
def measure(folder: Path, allocation: Allocation, task: Facts, prompts: int, path: Path) -> None:
    """Answer held-out prompts under every choice of heads, and write each arm to a JSON file once it is complete."""
    model = HybridMemForCausalLM.from_pretrained(folder)
    model.config.attention_window, model.config.num_sink_tokens = (
        allocation.attention_window,
        allocation.num_sink_tokens,
    )
    lower_precision(model, "bfloat16")
    tokenizer: Any = tokenizer_of_policy(str(folder))
    examples = [task.example("val", number) for number in range(prompts)]
    done = read_arms(path)
    for name, sources in list(choices(allocation))[len(done) :]:
        texts: list[str] = []
        for first in range(0, prompts, BLOCK):
            asked = [example["prompt"] for example in examples[first : first + BLOCK]]
            with model.head_sources(sources):
                texts += answer(model, tokenizer, asked, ANSWER_LENGTH)
        earned = task.reward([e["prompt"] for e in examples], texts, [e["answer"] for e in examples])
        opened = sum(row.count("full") for row in sources)
        size = cache_bytes(model, sources, CACHED)
        done.append(Arm(name, opened, sum(map(len, sources)), size, texts, [reward == 1 for reward in earned]))
        write_whole(path, json.dumps([asdict(arm) for arm in done], indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears only when it is complete."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_arms(path: Path) -> list[Arm]:
    """Return the arms that are complete."""
    return [Arm(**values) for values in json.loads(path.read_text())] if path.exists() else []


def cache_bytes(model: HybridMemForCausalLM, sources: list[list[str]], tokens: int) -> float:
    """Return the bytes of a cache of `tokens` tokens, from the growth of a shorter one.

    Once the window is full, the cache grows by the same bytes with every token.
    """
    pieces = [torch.zeros(1, count, dtype=torch.long) for count in (PIECE, PIECE, PIECE)]
    sizes = []
    cache = DynamicCache(config=model.config)
    with model.head_sources(sources):
        for piece in pieces:
            model(piece, past_key_values=cache, logits_to_keep=1)
            sizes.append(state_bytes(cache))
    return sizes[-1] + (sizes[-1] - sizes[-2]) / PIECE * (tokens - len(pieces) * PIECE)


def sentence(arms: list[Arm]) -> str:
    """Return the comparison in one sentence."""
    everything, learned, random = arms
    accuracies = [f"{100 * arm.accuracy:.0f} %" for arm in arms]
    return (
        f"{accuracies[0]} correct with all heads, {accuracies[1]} with {share(learned)}, "
        f"{accuracies[2]} with {random.opened} random heads; KV cache at {CACHED:,} tokens "
        f"{learned.cache / 1e6:.0f} MB instead of {everything.cache / 1e6:.0f} MB"
    )


def share(arm: Arm) -> str:
    """Spell the share of open heads, such as one head in five."""
    one_in = arm.heads / max(1, arm.opened)
    if round(one_in) < len(NUMBERS) and abs(one_in - round(one_in)) < 0.05 and NUMBERS[round(one_in)]:
        return f"one head in {NUMBERS[round(one_in)]}"
    return f"{arm.opened} of {arm.heads} heads"
