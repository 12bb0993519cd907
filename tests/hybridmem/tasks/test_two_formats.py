import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridmem.metrics import FormatShare
from hybridmem.tasks import Task, TwoFormats

TASK = TwoFormats()


@settings(max_examples=100, deadline=None)
@given(digits=st.integers(1, 2), index=st.integers(0, 500), split=st.sampled_from(["train", "val"]))
def test_answers_work_the_sum_out(digits, index, split):
    task = TwoFormats(digits=digits)
    example = task.example(split, index)
    first, second = map(int, re.fullmatch(r"(\d+),(\d+):", example["prompt"]).groups())
    assert len(str(first)) == len(str(second)) == digits
    answer = example["answer"]
    assert task.final_answer(answer) == str(first + second)
    steps = [tuple(map(int, step)) for step in re.findall(r"(\d)\+(\d)[=#](\d+)", answer)]
    assert [a for a, _, _ in steps] == [int(digit) for digit in str(first)[::-1]]
    assert [b for _, b, _ in steps] == [int(digit) for digit in str(second)[::-1]]
    assert all(a + b == total for a, b, total in steps)
    assert [name for name, pattern in task.formats.items() if re.search(pattern, answer)] == [example["format"]]
    assert len(answer) < task.max_completion_length


def test_the_formats_look_as_documented():
    answers = {}
    for index in range(60):
        example = TASK.example("train", index)
        answers.setdefault(example["format"], example["answer"])
    assert re.fullmatch(r"\d\+\d=\d+, \d\+\d=\d+, so \d+", answers["equation"])
    assert re.fullmatch(r"a=\d\+\d#\d+;b=\d\+\d#\d+;r=\d+", answers["python"])


def test_the_longest_answer_just_fits():
    task = TwoFormats(digits=1)
    longest = max(len(task.example(split, n)["answer"]) for split in ("train", "val") for n in range(300))
    assert longest + 1 == task.max_completion_length


@pytest.mark.parametrize("mixture", [0.0, 0.5, 0.8, 1.0])
def test_the_mixture_is_the_share_of_equations(mixture):
    task, share = TwoFormats(mixture=mixture), FormatShare(TASK.formats)
    share.update([task.example("train", index)["answer"] for index in range(400)])
    values = share.compute()
    assert values["share/equation"].item() == pytest.approx(mixture, abs=0.07)
    assert values["share/other"] == 0


def test_pairs_are_held_out_and_all_of_them_are_in_a_split():
    task = TwoFormats(digits=1, val_fraction=0.3)
    train, val = ({tuple(pair) for pair in task.pairs[split].tolist()} for split in ("train", "val"))
    assert not train & val
    assert train | val == {(a, b) for a in range(10) for b in range(10)}
    assert len(val) == 30
    assert TwoFormats(digits=1, val_fraction=0.3, seed=1).pairs["val"].tolist() != task.pairs["val"].tolist()


def test_an_example_follows_from_seed_split_and_index():
    assert TASK.example("val", 3) == TwoFormats().example("val", 3)
    assert len({TwoFormats(seed=seed).example("val", 3)["prompt"] for seed in range(5)}) > 1


def test_the_right_sum_counts_in_any_format():
    answer = "7+5=12, 3+4=7, so 82"
    completions = {
        "7+5=12, 3+4=7, so 82": True,
        "a=7+5#12;b=3+4#7;r=82": True,
        "82": True,
        "it is 82 \n": True,
        "r=082": True,
        "7+5=12, 3+4=7, so 81": False,
        "182": False,
        "82.": False,
        "": False,
        "7+5=12": False,
    }
    answers = [answer] * len(completions)
    assert TASK.is_right([*completions], answers) == [*completions.values()]
    rewards = TASK.reward(["37,45:"] * len(answers), [*completions], answer=answers, format=["equation"] * len(answers))
    assert rewards == [float(right) for right in completions.values()]


def test_wrong_answers_have_a_format_and_broken_ones_none():
    share = FormatShare(TASK.formats)
    share.update(["7+5=13, 3+4=9, so 1", "a=1+1#3;r=4", "82", "7+5=12, 3+4=7", "a=7+5#12;r="])
    values = share.compute()
    assert [values[f"share/{name}"].item() for name in ("equation", "python", "other")] == [0.2, 0.2, 0.6]


def test_it_is_a_task():
    assert isinstance(TASK, Task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mixture=1.2), r"mixture=1\.2 must be between 0 and 1"),
        (dict(digits=0), "digits must be at least 1"),
        (dict(digits=4), "digits=4 must be at most 3"),
        (dict(val_fraction=0.0), "val_fraction must lie between 0 and 1"),
        (dict(seed=-1), "seed must be at least 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        TwoFormats(**options)
