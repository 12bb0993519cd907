"""Ranking scores of held-out queries, logged with their rewards."""

from types import SimpleNamespace
from unittest.mock import Mock

import lightning as L
import pytest

from hybridmem.rl import RankingReward
from hybridmem.rl.rewards.ranking import write_answer
from hybridmem.training import PolicyModule, RankingScores
from hybridmem.training.policy.validation import Answered

FOUND = {"good": ["a", "b"], "late": ["b", "a"]}


asked = []


def find(queries, k):
    """Return results, or None for queries on which the retriever fails."""
    asked.extend(queries)
    return [FOUND.get(query) for query in queries]


def trainer_of(task):
    """Return the parts of a task's trainer that the callback reads."""
    return Mock(spec=L.Trainer, datamodule=SimpleNamespace(task=task))


def test_means_of_ranking_scores():
    ranking = RankingReward("ndcg", 2, find, think=False)
    logs = {}
    asked.clear()
    trainer, module = trainer_of(SimpleNamespace(ranking=ranking)), Mock(spec=PolicyModule)
    module.log.side_effect = lambda name, value, **_: logs.__setitem__(name, value)
    scores = RankingScores()
    for _ in range(2):  # the prompts are searched only once
        scores.on_validation_epoch_start(trainer, module)
        for texts in ([write_answer("good"), write_answer("late")], ["no query", write_answer("down")]):
            answered = Answered([{"prompt": "late\n", "relevance": ["a"]}] * 2, texts, texts)
            scores.on_validation_batch_end(trainer, module, answered, None)
        scores.on_validation_epoch_end(trainer, module)
    assert logs["val/mrr@2"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert logs["val/recall@2"] == pytest.approx(2 / 3)
    assert logs["val/malformed"] == 1 / 4
    assert logs["val/prompt/mrr@2"] == 1 / 2
    assert (
        asked.count("late") == 4
    )  # once as an answer in each validation, and as the prompt in both batches of the first


def test_it_needs_a_ranking():
    trainer = trainer_of(object())
    with pytest.raises(ValueError, match="needs a task with a ranking"):
        RankingScores().setup(trainer, Mock(spec=PolicyModule), "fit")
    with pytest.raises(ValueError, match="supports PolicyModule"):
        RankingScores().setup(trainer, Mock(spec=L.LightningModule), "fit")
