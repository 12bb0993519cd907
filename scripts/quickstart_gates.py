"""The next bytes of source by the small model, with all heads of its gate, with the learned ones, and random ones."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from greedy_answers import answer
from quickstart_heads import CACHED, PIECE, write_whole
from transformers import DynamicCache

from hybridmem.checks import at_least
from hybridmem.model.cache import state_bytes
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.rl import FixedAllocation
from hybridmem.rl.attention.sources import GateUnits
from hybridmem.tasks.identifier import source_files, split_files
from hybridmem.tasks.task import Split, example_generator
from hybridmem.training.checkpoints.contents import tokenizer_of_policy

BLOCK = 64  # prompts at a time
BUDGET = 0.5  # share of heads that keep the memory
DRAWS = 6  # choices of random heads
FLOAT = 4  # bytes


class NextBytes:
    """Python source, cut at a random place; the answer is the next few characters.

    Files are held out as by TextDataModule with its default settings.

    Args:
        context: characters in a prompt.
        length: characters in an answer.
    """

    def __init__(self, context: int = 512, length: int = 4):
        at_least(1, context=context, length=length)
        self.context, self.length = context, length
        self.files = split_files(source_files(None), val_fraction=0.05, seed=0)

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return {"prompt", "answer"} from a file that is long enough."""
        rng, files = example_generator(0, split, index), self.files[split]
        while True:
            text = files[int(rng.integers(len(files)))].read_text(errors="ignore")
            if len(text) > self.context + self.length:
                cut = int(rng.integers(self.context, len(text) - self.length))
                return {"prompt": text[cut - self.context : cut], "answer": text[cut : cut + self.length]}

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return the share of characters before the first wrong one."""
        return [share_right(text, right) for text, right in zip(completions, answer, strict=True)]

    @property
    def max_completion_length(self) -> int:
        """Return the number of characters in an answer."""
        return self.length


def share_right(text: str, right: str) -> float:
    """Return the share of an answer's characters before the first wrong one."""
    wrong = (place for place, letter in enumerate(right) if text[place : place + 1] != letter)
    return next(wrong, len(right)) / len(right)


@dataclass(frozen=True)
class GateArm:
    """Answers under one choice of the gate's heads; `score` is the mean share of right characters."""

    name: str
    opened: int  # heads that read the memory
    score: float
    texts: list[str]


def choices(learned: list[int], heads: int) -> list[tuple[str, list[list[int]]]]:
    """Return each arm's name with one or more choices of open heads, whose scores are averaged."""
    orders = [FixedAllocation(order="random", seed=seed, budget=BUDGET).units_in_order(heads) for seed in range(DRAWS)]
    drawn = [order[: len(learned)].tolist() for order in orders]
    everything = list(range(heads))
    return [("all heads", [everything]), ("learned heads", [learned]), ("random heads", drawn), ("no head", [[]])]


@torch.inference_mode()
def measure_gates(folder: Path, learned: list[int], prompts: int, path: Path) -> None:
    """Continue held-out source under every choice of heads, and write the arms to a JSON file."""
    model = HybridMemForCausalLM.from_pretrained(folder)
    tokenizer = tokenizer_of_policy(str(folder))
    task, units = NextBytes(), GateUnits(model)
    examples = [task.example("val", number) for number in range(prompts)]
    heads = len(units.layers) * units.num_heads
    arms = []
    for name, drawn in choices(learned, heads):
        answers = [written(model, tokenizer, units, opened, task, examples) for opened in drawn]
        scores = [score for _, score in answers]
        arms.append(GateArm(name, len(drawn[0]), sum(scores) / len(scores), answers[0][0]))
    write_whole(path, json.dumps([asdict(arm) for arm in arms], indent=1) + "\n")


def written(
    model: HybridMemForCausalLM,
    tokenizer: Any,
    units: GateUnits,
    opened: list[int],
    task: NextBytes,
    examples: list[dict[str, Any]],
) -> tuple[list[str], float]:
    """Return the answers with some heads open, and their mean score."""
    share = torch.zeros(1, len(units.layers) * units.num_heads)
    share[:, opened] = 1
    texts: list[str] = []
    with units.applied(model, share.view(1, len(units.layers), units.num_heads)):
        for first in range(0, len(examples), BLOCK):
            asked = [example["prompt"] for example in examples[first : first + BLOCK]]
            texts += answer(model, tokenizer, asked, task.length)
    earned = task.reward([e["prompt"] for e in examples], texts, [e["answer"] for e in examples])
    return texts, sum(earned) / len(examples)


def read_gate_arms(path: Path) -> list[GateArm]:
    """Return the arms in a file."""
    return [GateArm(**values) for values in json.loads(path.read_text())]


@torch.inference_mode()
def cache_sentence(folder: Path) -> str:
    """Return the bytes of the model's state, and of full attention's cache in its place."""
    model = HybridMemForCausalLM.from_pretrained(folder)
    config, cache = model.config, DynamicCache(config=model.config)
    for _ in range(2):
        model(torch.zeros(1, PIECE, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * CACHED * FLOAT
    return (
        f"windows and memory hold {state_bytes(cache) / 1e6:.1f} MB at any length, "
        f"full attention's cache would hold {keys / 1e6:.0f} MB at {CACHED:,} bytes"
    )


def gate_sentence(arms: list[GateArm]) -> str:
    """Return the comparison in one sentence."""
    everything, learned, random, nothing = (f"{100 * arm.score:.0f} %" for arm in arms)
    count = f"{arms[1].opened} of {arms[0].opened}"
    return (
        f"{everything} of the next characters right with the memory in all heads of the gate, {learned} with the "
        f"{count} learned heads, {random} with {arms[2].opened} random heads, {nothing} with none"
    )
