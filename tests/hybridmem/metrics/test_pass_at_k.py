"""pass@k and maj@k, compared with an enumeration of all subsets."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridmem.metrics import MajAtK, PassAtK, maj_at_k, pass_at_k


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, data):
    k = data.draw(st.integers(1, len(right)))
    subsets = list(combinations(right, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert pass_at_k(torch.tensor([right]), k).item() == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow():
    right = torch.zeros(1, 2000, dtype=torch.bool)
    right[0, :20] = True
    expected = 1 - math.comb(1980, 100) / math.comb(2000, 100)
    assert pass_at_k(right, 100).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("votes", "k", "expected"),
    [
        ("aab", 3, 1),
        ("abb", 3, 0),
        ("aabb", 4, 1 / 2),  # a tie between two answers
        ("abc", 3, 1 / 3),
        ("bbcc", 4, 0),  # a tie between wrong answers
        (["a", None, None], 3, 1),  # unreadable answers have no vote
        ([None, None, None], 3, 0),
        ("aabbba", 3, 1 / 2),  # two groups: aab, bba
        ("aabb", 3, 1),  # the fourth answer is left over
        ("ab", 1, 1 / 2),
    ],
)
def test_maj_at_k(votes, k, expected):
    assert maj_at_k([list(votes)], ["a"], k).item() == pytest.approx(expected)


def test_the_metrics_are_means_over_prompts():
    passed, won = PassAtK(2), MajAtK(3)
    passed.update(torch.tensor([[True, False, False]]))  # 1 − C(2, 2) / C(3, 2) = 2/3
    passed.update(torch.tensor([[False, False, False], [True, True, False]]))
    assert passed.compute().item() == pytest.approx((2 / 3 + 0 + 1) / 3)
    won.update([["1", "1", "2"]], ["1"])
    won.update([["1", "2", "3"], ["2", "2", "1"]], ["1", "1"])
    assert won.compute().item() == pytest.approx((1 + 1 / 3 + 0) / 3)


def test_refusals():
    with pytest.raises(ValueError, match="k=4 needs 4 samples of every prompt, not 3"):
        pass_at_k(torch.zeros(1, 3, dtype=torch.bool), 4)
    with pytest.raises(ValueError, match="k=4 needs 4 samples"):
        maj_at_k([["a"] * 3], ["a"], 4)
    for metric in (PassAtK, MajAtK):
        with pytest.raises(ValueError, match="k must be at least 1"):
            metric(0)
