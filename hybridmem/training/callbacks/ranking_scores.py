"""How well held-out queries find what they should, beside the reward that is made of it."""

import math
from typing import Any

import lightning as L

from hybridmem.metrics.ranking import RANKING_METRICS
from hybridmem.rl.rewards.ranking import RankingReward, write_answer
from hybridmem.training.policy.module import PolicyModule
from hybridmem.training.policy.validation import Answered


class RankingScores(L.Callback):
    """Logs `val/ndcg@K`, `val/recall@K`, `val/mrr@K` and `val/malformed` of the likeliest responses.

    A response without a query scores 0. One that the retriever fails on has no score. `val/prompt/ndcg@K` and
    the others are what the prompts find as they stand, asked for once: what a query has to be better than.

    Raises:
        ValueError: a module that is no PolicyModule, or a task without a `ranking` (a RankingReward).
    """

    def __init__(self) -> None:
        self._scores: dict[str, list[float | str]] = {}
        self._of_prompts: dict[str, list[float | str]] = {}
        self._asked_prompts = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look whether there is a ranking."""
        if not isinstance(pl_module, PolicyModule):
            raise ValueError(f"RankingScores looks at PolicyModule, not {type(pl_module).__name__}: remove it")
        if not hasattr(trainer.datamodule.task, "ranking"):
            task = type(trainer.datamodule.task).__name__
            raise ValueError(f"RankingScores needs a task with a ranking, which {task} has not: remove it")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last validation."""
        self._scores = {metric: [] for metric in RANKING_METRICS}
        if not self._asked_prompts:  # of a validation that was interrupted
            self._of_prompts = {metric: [] for metric in RANKING_METRICS}

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        """Score what was answered."""
        answered: Answered = outputs
        ranking: RankingReward = trainer.datamodule.task.ranking
        column = ranking.relevance_column
        relevance = {column: [example[column] for example in answered.examples]}
        _add(self._scores, ranking.scores(answered.greedy, *self._scores, **relevance))
        if not self._asked_prompts:
            thought = "" if ranking.think else None
            as_they_stand = [write_answer(example["prompt"].strip(), thought) for example in answered.examples]
            _add(self._of_prompts, ranking.scores(as_they_stand, *self._of_prompts, **relevance))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the means."""
        k = trainer.datamodule.task.ranking.k
        self._asked_prompts = True
        for prefix, found in (("val/", self._scores), ("val/prompt/", self._of_prompts)):
            for metric, scores in found.items():
                pl_module.log(f"{prefix}{metric}@{k}", _mean(scores), sync_dist=True)
        malformed = self._scores["ndcg"].count("malformed") / len(self._scores["ndcg"])
        pl_module.log("val/malformed", malformed, sync_dist=True)


def _add(scores: dict[str, list[float | str]], found: list[list[float | str]]) -> None:
    for known, more in zip(scores.values(), found, strict=True):
        known += more


def _mean(scores: list[float | str]) -> float:
    known = [0.0 if score == "malformed" else float(score) for score in scores if score != "failed"]
    return sum(known) / len(known) if known else math.nan
