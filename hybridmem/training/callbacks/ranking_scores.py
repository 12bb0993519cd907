"""Ranking metrics of held-out queries."""

import math
from typing import Any

import lightning as L

from hybridmem.metrics.ranking import RANKING_METRICS
from hybridmem.rl.rewards.ranking import RankingReward, write_answer
from hybridmem.training.policy.module import PolicyModule
from hybridmem.training.policy.validation import Answered


class RankingScores(L.Callback):
    """Callback that logs `val/ndcg@K`, `val/recall@K`, `val/mrr@K` and `val/malformed` of greedy responses.

    A response without a query scores 0. Responses on which the retriever fails are left out. The baselines
    `val/prompt/ndcg@K`, `val/prompt/recall@K` and `val/prompt/mrr@K` use the unchanged prompt as the query and are
    computed once.

    Raises:
        ValueError: the module is not a PolicyModule, or the task has no `ranking` (a RankingReward).
    """

    def __init__(self) -> None:
        self._scores: dict[str, list[float | str]] = {}
        self._of_prompts: dict[str, list[float | str]] = {}
        self._asked_prompts = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the task has a ranking."""
        if not isinstance(pl_module, PolicyModule):
            raise ValueError(f"RankingScores supports PolicyModule, not {type(pl_module).__name__}; remove it")
        if not hasattr(trainer.datamodule.task, "ranking"):
            task = type(trainer.datamodule.task).__name__
            raise ValueError(f"RankingScores needs a task with a ranking, which {task} lacks; remove it")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clear the scores of the last validation."""
        self._scores = {metric: [] for metric in RANKING_METRICS}
        if not self._asked_prompts:  # first validation, or the first one was interrupted
            self._of_prompts = {metric: [] for metric in RANKING_METRICS}

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        """Score a batch of responses, and in the first validation their prompts."""
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
        """Log the mean scores."""
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
