import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from hybridmem.tasks import Task, VisualSearch

IMAGES, DIGITS = load_digits(return_X_y=True)
DIGIT_OF = {(image / 16).astype(np.float32).tobytes(): int(digit) for image, digit in zip(IMAGES, DIGITS, strict=True)}


def field(example: dict) -> list[int]:
    """Return the digits in the images."""
    return [DIGIT_OF[patch.numpy().tobytes()] for patch in example["images"]]


@pytest.mark.parametrize("grid", [1, 3, 11])
@pytest.mark.parametrize("split", ["train", "val"])
def test_answers_are_right(grid, split):
    task = VisualSearch(grid=grid)
    kinds = set()
    for index in range(40):
        example = task.example(split, index)
        assert example["images"].shape == (grid**2, 64)
        assert example["images"].dtype == torch.float32
        digits = field(example)
        asked = int(next(filter(str.isdigit, example["prompt"])))
        if example["question"] == "where":
            assert example["prompt"] == f"where is the {asked}?"
            row, column = map(int, example["answer"].split(","))
            assert digits.count(asked) == 1
            assert digits.index(asked) == (row - 1) * grid + column - 1
        else:
            assert example["prompt"] == f"how many {asked}s?"
            assert digits.count(asked) == int(example["answer"]) <= grid
        assert len(example["answer"]) + 1 <= task.max_completion_length
        kinds.add(example["question"])
    assert kinds == {"where", "count"}


def test_pixels_lie_between_0_and_1():
    images = VisualSearch(grid=10).example("train", 0)["images"]
    assert images.min() == 0
    assert images.max() == 1


def test_no_image_is_in_both_splits():
    task = VisualSearch()
    train, val = ({patch.tobytes() for patch in np.concatenate(task.patches[split])} for split in ("train", "val"))
    assert not train & val
    assert len(train) + len(val) == len(IMAGES)
    assert len(val) / len(IMAGES) == pytest.approx(0.2, abs=0.01)


def test_an_example_follows_from_seed_split_and_index():
    first, again, other = (VisualSearch(seed=seed).example("train", 5) for seed in (1, 1, 2))
    assert (first["prompt"], first["answer"]) == (again["prompt"], again["answer"])
    assert torch.equal(first["images"], again["images"])
    assert not torch.equal(first["images"], other["images"])


def test_one_kind_of_question():
    task = VisualSearch(grid=12, questions=["count"])
    assert {task.example("train", index)["question"] for index in range(20)} == {"count"}
    assert task.max_completion_length == 3


def test_every_count_is_as_likely():
    task = VisualSearch(grid=3, questions=["count"])
    answers = [task.example("train", index)["answer"] for index in range(400)]
    assert all(answers.count(answer) > 60 for answer in "0123")


def test_reward():
    rewards = VisualSearch().reward(prompts=["?"] * 3, completions=["2,3", "2,3\n", "3,2"], answer=["2,3"] * 3)
    assert rewards == [1, 1, 0]


def test_it_is_a_task():
    assert isinstance(VisualSearch(), Task)


def test_refusals(monkeypatch):
    for options, message in [
        (dict(grid=0), "grid must be at least 1"),
        (dict(questions=[]), "must contain one or more of where, count"),
    ]:
        with pytest.raises(ValueError, match=message):
            VisualSearch(**options)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install hybridmem\[data\]"):
        VisualSearch()
