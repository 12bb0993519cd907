"""Rec-R1's reward for queries, malformed responses and retriever failures."""

import logging

import pytest
import torch

from hybridmem.rl import RankingReward, RewardSum
from hybridmem.rl.rewards.ranking import parse_query, write_answer

FOUND = {"good": ["a", "b"], "late": ["b", "a"], "bad": ["b"], "empty": []}


def find(queries, k):
    return [FOUND[query][:k] for query in queries]


def reward(*queries, retriever=find, metric="ndcg", **settings):
    function = RankingReward(metric, 2, retriever, think=False, **settings)
    completions = [write_answer(query) for query in queries]
    return function(completions=completions, relevance=[["a"]] * len(queries)), function


def test_rule():
    rewards, _ = reward("good", "late", "bad", "empty")
    assert rewards == pytest.approx([1.1, 0.1 + 1 / torch.log2(torch.tensor(3.0)).item(), 0, 0])
    assert reward("late", metric="mrr")[0] == pytest.approx([0.6])
    assert reward("late", metric="recall")[0] == pytest.approx([1.1])


def test_graded_relevance():
    function = RankingReward("ndcg", 1, find, think=False)
    (score,) = function(completions=[write_answer("good")], relevance=[{"a": 0.1, "c": 1.0}])
    assert score == pytest.approx(0.1 + 0.1)


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ('<think>so</think><answer>{"query": "x y"}</answer>', "x y"),
        ('  <think></think>\n<answer>\n{"query": "", "n": 1}</answer>\n', ""),
        ('<answer>{"query": "x"}</answer>', None),
        ('<think>a</think><think>b</think><answer>{"query": "x"}</answer>', None),
        ('<think>a</think><answer>{"query": "x"}</answer><answer>{"query": "y"}</answer>', None),
        ('<think>a</think><answer>{"query": "x"}</answer> and', None),
        ('<think>a</think>hm<answer>{"query": "x"}</answer>', None),
        ('<answer>{"query": "x"}</answer><think>a</think>', None),
        ("<think>a</think><answer>x</answer>", None),
        ('<think>a</think><answer>{"query": 3}</answer>', None),
        ('<think>a</think><answer>["query"]</answer>', None),
        ('<think>a</think><answer>{"ask": "x"}</answer>', None),
        ("<think>a</think><answer>" + "[" * 100_000 + "</answer>", None),
        ("", None),
    ],
)
def test_format(text, query):
    assert parse_query(text) == query
    function = RankingReward("ndcg", 2, lambda queries, k: [["a"] for _ in queries])
    assert function(completions=[text], relevance=[["a"]]) == [-2.0 if query is None else pytest.approx(1.1)]


def test_messages_and_optional_thinking():
    assert parse_query([{"role": "assistant", "content": '<answer>{"query": "x"}</answer>'}], think=False) == "x"
    assert parse_query('<think>a</think><answer>{"query": "x"}</answer>', think=False) is None
    assert parse_query(write_answer('"ü" </answer>', "hm")) is None
    assert parse_query(write_answer('say "ü"', "hm")) == 'say "ü"'


def test_asks_once_for_all():
    asked = []

    def retriever(queries, k):
        asked.append((queries, k))
        return find(queries, k)

    reward("good", "bad", "good", retriever=retriever)
    assert asked == [(["good", "bad"], 2)]


def down(queries, k):
    raise ConnectionError("away")


def half(queries, k):
    return [None if query == "bad" else ["a"] for query in queries]


@pytest.mark.parametrize(
    ("retriever", "expected", "failures"),
    [
        (down, [0, 0], 2),
        (half, [1.1, 0], 1),
        (lambda queries, k: [], [0, 0], 2),
        (lambda queries, k: "ab", [0, 0], 2),
        (lambda queries, k: [["a"], [None]], [0, 0], 2),
    ],
)
def test_failures_are_counted_and_get_failed_reward(retriever, expected, failures, caplog):
    with caplog.at_level(logging.WARNING):
        rewards, function = reward("good", "bad", retriever=retriever)
    assert rewards == pytest.approx(expected)
    assert function.failures == failures
    ignored, _ = reward("good", "bad", retriever=retriever, failed_reward=None)
    assert ignored == [pytest.approx(one) if one else None for one in expected]
    with pytest.raises((RuntimeError, ValueError, ConnectionError)):
        reward("good", "bad", retriever=retriever, raise_failures=True)


def test_failures_are_logged_with_the_rewards():
    function = RankingReward("ndcg", 2, down, think=False)
    rewards = RewardSum([function])
    prompts = ["p", "q"]
    earned = rewards(prompts, [write_answer("good"), "rubbish"], [[1], [2]], relevance=[["a"], ["a"]])
    assert earned.total.tolist() == [0, -2]
    metrics = rewards.metrics(earned)
    assert metrics["rewards/ndcg@2/failures"] == 1
    assert metrics["rewards/ndcg@2/mean"] == -1


def test_settings():
    with pytest.raises(ValueError, match="metric must be one of ndcg, recall, mrr"):
        RankingReward("map", 2, find)
    with pytest.raises(ValueError, match="k must be at least 1"):
        RankingReward("ndcg", 0, find)
    with pytest.raises(ValueError, match="relevance_column='gains'"):
        RankingReward("ndcg", 2, find, relevance_column="gains")(completions=["x"], relevance=[["a"]])
