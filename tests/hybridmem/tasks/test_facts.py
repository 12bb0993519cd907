import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridmem.tasks import Facts, Task
from hybridmem.tasks.facts import KEYS, docstrings

FACT = re.compile(r"The access code of (\w+) is (\d+)\.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write files of paragraphs that contain their file's name."""
    path = tmp_path_factory.mktemp("text")
    for n in range(10):
        paragraphs = [f"Paragraph {line} of file {n} holds a few plain words." for line in range(3 + n)]
        (path / f"{n}.txt").write_text("\n\n".join(paragraphs))
    return path


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(600, 3000),
    num_facts=st.integers(1, 8),
    digits=st.integers(1, 6),
    question_first=st.booleans(),
    index=st.integers(0, 50),
    split=st.sampled_from(["train", "val"]),
)
def test_examples(folder, length, num_facts, digits, question_first, index, split):
    options = dict(length=length, num_facts=num_facts, digits=digits, question_first=question_first)
    task = Facts(path=str(folder), pattern="*.txt", val_fraction=0.2, **options)
    example = task.example(split, index)
    prompt, answer = example["prompt"], example["answer"]
    facts = FACT.findall(prompt)
    assert len(facts) == len(dict(facts)) == len({value for _, value in facts}) == num_facts
    assert {len(value) for _, value in facts} == {digits}
    assert {key for key, _ in facts} <= set(KEYS)

    asked = re.search(r"What is the access code of (\w+)\?$", prompt)[1]
    assert answer == f"The access code of {asked} is {dict(facts)[asked]}."
    assert prompt.startswith("What is") == question_first
    assert len(prompt) == length
    assert prompt[: len(prompt) - example["distance"]].endswith(answer)
    assert len(answer) < task.max_completion_length

    assert example == Facts(path=str(folder), pattern="*.txt", val_fraction=0.2, **options).example(split, index)
    assert example != task.example(split, index + 1)


def test_splits_read_different_files(folder):
    task = Facts(path=str(folder), pattern="*.txt", val_fraction=0.2)
    named = {
        split: {n for i in range(20) for n in re.findall(r"of file (\d)", task.example(split, i)["prompt"])}
        for split in ("train", "val")
    }
    assert len(named["val"]) == 2
    assert not named["train"] & named["val"]


def test_asked_facts_lie_anywhere(folder):
    task = Facts(path=str(folder), pattern="*.txt", num_facts=4, val_fraction=0.2)
    places = []
    for index in range(80):
        example = task.example("train", index)
        facts = [f"The access code of {key} is {value}." for key, value in FACT.findall(example["prompt"])]
        places.append(facts.index(example["answer"]))
    assert all(places.count(place) > 5 for place in range(4))


def test_the_standard_library_gives_docstrings():
    example = Facts(length=700, seed=3).example("val", 0)
    assert len(example["prompt"]) == 700
    assert len(FACT.findall(example["prompt"])) == 4


def test_rewards_are_exact(folder):
    task = Facts(path=str(folder), pattern="*.txt", val_fraction=0.2)
    right = "The access code of Oslo is 4821."
    completions = [right, f" {right}\n", right[:-1], right.replace("4821", "4822"), f"{right} It is."]
    assert task.reward([""] * 5, completions, [right] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert isinstance(task, Task)


def test_docstrings():
    assert docstrings('"""One."""\ndef f():\n    "Two."\nclass C:\n    x = 1\n') == ["One.", "Two."]
    assert docstrings("def f(:") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(length=100), "length=100 is too short for num_facts=4"),
        (dict(num_facts=0), "num_facts must be at least 1, not 0"),
        (dict(num_facts=10, digits=1), "digits=1 gives too few values for num_facts=10"),
        (dict(val_fraction=1.0), "val_fraction must lie between 0 and 1"),
        (dict(pattern="*.rst"), "has no file that matches pattern='\\*.rst'"),
    ],
)
def test_impossible_settings(folder, options, message):
    with pytest.raises(ValueError, match=message):
        Facts(path=str(folder), **{"pattern": "*.txt", "val_fraction": 0.2, **options})
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Facts(path="nowhere")


def test_files_without_text(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="the train files contain no paragraph of 20 characters"):
        Facts(path=str(tmp_path), val_fraction=0.5).example("train", 0)
