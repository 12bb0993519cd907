"""Files in ESCI's format: judgements, splits, gains and errors."""

import json

import pytest

from hybridmem.rl.rewards.ranking import write_answer
from hybridmem.tasks import ProductSearch, Task

PRODUCTS = [
    {"product_id": "H", "product_title": "7-in-1 dock", "product_description": "usb-c hub", "product_brand": "x"},
    {"product_id": "C", "product_title": "USB cable", "product_description": None},
    {"product_id": "L", "product_title": "desk lamp"},
]
JUDGED = [
    {"query": "usb c hub", "product_id": "H", "esci_label": "E", "split": "train"},
    {"query": "usb c hub", "product_id": "C", "esci_label": "C", "split": "train"},
    {"query": "lamp", "product_id": "L", "esci_label": "E", "split": "test"},
    {"query": "lamp", "product_id": "H", "esci_label": "I", "split": "test"},
    {"query": "sofa", "product_id": "L", "esci_label": "I", "split": "test"},
]


def write(folder, judged=JUDGED, products=PRODUCTS):
    for name, rows in (("examples", judged), ("products", products)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dict(examples=str(folder / "examples.jsonl"), products=str(folder / "products.jsonl"))


def test_examples_and_rewards(tmp_path):
    task = ProductSearch(**write(tmp_path), think=False, max_completion_length=99)
    assert isinstance(task, Task)
    assert task.max_completion_length == 99
    assert task.queries == {"train": ["usb c hub"], "val": ["lamp"]}
    example = task.example("train", 0)
    assert "Query: usb c hub" in example["prompt"]
    assert example["answer"] == write_answer("usb c hub")
    assert example["relevance"] == {"H": 1.0, "C": 0.01}
    rewards = task.reward(
        [""] * 3, [write_answer("dock"), write_answer("lamp"), "dock"], [""] * 3, relevance=[example["relevance"]] * 3
    )
    best = 1 + 0.01 / 1.584962500721156
    assert rewards == [pytest.approx(0.1 + 1 / best), 0, -2]


def test_binary_gains_and_splits_of_our_own(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "split"} for row in JUDGED]
    binary = {"E": 1.0, "S": 0.0, "C": 0.0, "I": 0.0}
    task = ProductSearch(**write(tmp_path, rows), gains=binary, val_fraction=0.5)
    assert sorted(task.queries["train"] + task.queries["val"]) == ["lamp", "usb c hub"]
    assert task.judged["usb c hub"] == {"H": 1.0, "C": 0.0}


@pytest.mark.parametrize(
    ("judged", "settings", "message"),
    [
        ([{"query": "a", "product_id": "H"}], {}, ":1 lacks esci_label"),
        ([{**JUDGED[0], "esci_label": "X"}], {}, "esci_label='X'"),
        ([{**JUDGED[0], "split": "dev"}], {}, "split='dev'"),
        (JUDGED[:2], {}, "no usable query in split val"),
        (JUDGED[4:], {}, "gain above 0"),
        ([{**row, "product_id": "none"} for row in JUDGED[:3:2]], {}, "none of the products"),
        (JUDGED, {"prompt": "ask"}, "must contain {query}"),
        (JUDGED, {"k": 0}, "k must be at least 1"),
    ],
)
def test_what_cannot_work_is_named(tmp_path, judged, settings, message):
    with pytest.raises(ValueError, match=message):
        ProductSearch(**write(tmp_path, judged), **settings)


@pytest.mark.parametrize("name", ["examples", "products"])
def test_files_that_are_not_there_are_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name}='nowhere' does not exist"):
        ProductSearch(**{**write(tmp_path, JUDGED), name: "nowhere"})
