"""Answer formats, compared with counts made by hand."""

import math
import pickle

import pytest
import torch

from hybridmem.metrics import FormatShare

PATTERNS = {"code": r"^def |```", "boxed": r"\\boxed"}
TEXTS = ["def f", r"so \boxed{3}", "```\n\\boxed{3}", "three", "def g", "def h", r"\boxed{1}", "four"]
RIGHT = [True, False, True, True, False, False, False, False]


def first_word(text: str) -> str | None:
    word = text.split()[0]
    return word if word in ("def", "so", "three") else None


def test_shares_entropy_and_accuracy():
    metric = FormatShare(PATTERNS)
    metric.update(TEXTS[:5], RIGHT[:5])
    metric.update(TEXTS[5:], RIGHT[5:])
    values = {name: value.item() for name, value in metric.compute().items()}
    p = [1 / 2, 1 / 4, 1 / 4]
    assert values == pytest.approx(
        {
            "share/code": 1 / 2,
            "share/boxed": 1 / 4,
            "share/other": 1 / 4,
            "entropy": -sum(x * math.log(x) for x in p),
            "accuracy/code": 2 / 4,
            "accuracy/boxed": 0,
            "accuracy/other": 1 / 2,
        }
    )


def test_unjudged_and_unseen_formats_have_no_accuracy():
    metric = FormatShare(PATTERNS)
    metric.update(["def f", "four"])
    metric.update(["def f"], [True])
    values = metric.compute()
    assert values["share/boxed"] == 0
    assert {name for name in values if "accuracy" in name} == {"accuracy/code"}
    assert values["accuracy/code"] == 1


def test_one_format_has_no_entropy():
    metric = FormatShare(PATTERNS)
    metric.update(["def f"] * 3)
    assert metric.compute()["entropy"] == 0


def test_a_function_may_classify():
    metric = FormatShare(first_word, names=["def", "so", "three"])
    metric.update(TEXTS)
    shares = [value.item() for name, value in metric.compute().items() if name.startswith("share/")]
    assert shares == [3 / 8, 1 / 8, 1 / 8, 3 / 8]
    with pytest.raises(ValueError, match="returned 'so', which is not in names"):
        FormatShare(first_word, names=["def"]).update(["so be it"])


def test_it_can_be_sent_to_another_process():
    metric = pickle.loads(pickle.dumps(FormatShare(PATTERNS)))
    metric.update(TEXTS)
    assert torch.equal(metric.texts, torch.tensor([4.0, 2, 2], dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a": "("},), "a='\\(' is not a regular expression"),
        (({},), "must differ and not be 'other'"),
        (({"other": "x"},), "must differ and not be 'other'"),
        ((first_word, ["a", "a"]), "must differ"),
        ((first_word,), "names requires formats to be a function"),
        (({"a": "x"}, ["a"]), "names requires formats to be a function"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        FormatShare(*arguments)


def test_a_judgement_for_each_text():
    with pytest.raises(ValueError, match="right has 1 values for 2 texts"):
        FormatShare(PATTERNS).update(["a", "b"], [True])
