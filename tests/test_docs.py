"""Examples in the guides run, their settings parse, and the API reference lists every public name."""

import importlib
import re
from inspect import isclass, isfunction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

import hybridmem_kernels
from hybridmem.data import byte_tokenizer
from tests.hybridmem.models import tiny_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PUBLIC = (
    "hybridmem",
    "hybridmem.convert",
    "hybridmem.data",
    "hybridmem.metrics",
    "hybridmem.rl",
    "hybridmem.tasks",
    "hybridmem.training",
    "hybridmem_kernels",
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def names_in_text() -> dict[str, Any]:
    """Return the names that code fragments assume: a model, tokens, and an operator's inputs."""
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    alpha, eta, theta = torch.rand(3, 1, 2, 5) / 2
    input_ids = torch.randint(0, 37, (1, 20))
    return dict(
        model=tiny_model(torch.float32),
        input_ids=input_ids,
        pieces=input_ids.split([7, 1, 12], dim=1),
        hybridmem_kernels=hybridmem_kernels,
        memory_scan=hybridmem_kernels.memory_scan,
        q=q,
        k=k,
        v=v,
        alpha=alpha,
        eta=eta,
        theta=theta,
        ids=input_ids,
        labels=input_ids.roll(-1, dims=1),
        total=20,
    )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for setting in ("allocator.keep_freed_memory", "denormals.flush_denormals"):  # they affect the whole process
        monkeypatch.setattr(f"hybridmem.training.{setting}", lambda: None)
    if page.name == "README.md":  # written by the page's commands
        tiny_model(torch.float32, vocab_size=259).save_pretrained("my_model")
        byte_tokenizer().save_pretrained("my_model")
    if page.name == "scaling.md":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for block in blocks(page, "python"):
        names = names_in_text()
        exec(block, names)
        promised = re.findall(r"^((?:reward|critic)\(.*?\))  # (\[[^\n]*\])$", block, re.M | re.S)
        assert bool(promised) == (page.name == "rewards.md")
        for call, value in promised:
            assert eval(call, names) == yaml.safe_load(value), call


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.stem)
def test_settings_parse(page):
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), (dict, list)), block


def documented() -> set[str]:
    """Return the full names in docs/api.md; modules include their public names."""
    found: set[str] = set()
    for target, members in re.findall(r"^::: (\S+)(?:\n    options: \{members: (.*)\})?", API, re.M):
        owner, _, name = target.rpartition(".")
        if not isinstance(getattr(importlib.import_module(owner), name, None), type(importlib)):
            found.add(target)
            continue
        module = importlib.import_module(target)
        own = [n for n, part in vars(module).items() if getattr(part, "__module__", None) == target]
        shown = yaml.safe_load(members) if members else [n for n in own if not n.startswith("_")]
        found |= {f"{target}.{n}" for n in shown}
    return found


API = (ROOT / "docs" / "api.md").read_text()


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_in_the_reference(package):
    shown = documented()
    module = importlib.import_module(package)
    for name in module.__all__:
        part = getattr(module, name)
        # Functions wrapped for shape checks, and dynamically created types, can only be identified by name.
        home = part.__module__ if isclass(part) or isfunction(part) else ""
        assert f"{home}.{name}" in shown or any(entry.endswith(f".{name}") for entry in shown), f"{package}.{name}"
