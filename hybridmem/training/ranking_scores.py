"""How well held-out queries find what they should, beside the reward that is made of it."""

import math
from typing import Any

import lightning as L

from ..metrics.ranking import RANKING_METRICS
from .experience import Answered
from .policy import PolicyModule


class RankingScores(L.Callback):
    """Logs `val/ndcg@K`, `val/recall@K`, `val/mrr@K` and `val/malformed` of the likeliest responses.

    A response without a query scores 0. One that the retriever fails on has no score.

    Raises:
        ValueError: a module that is no PolicyModule, or a task without a `ranking` (a RankingReward).
    """

    def __init__(self) -> None:
        self._scores: dict[str, list[float | str]] = {}

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

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        """Score what was answered."""
        answered: Answered = outputs
        ranking = trainer.datamodule.task.ranking
        column = ranking.relevance_column
        relevance = {column: [example[column] for example in answered.examples]}
        found = ranking.scores(answered.greedy, *self._scores, **relevance)
        for scores, more in zip(self._scores.values(), found, strict=True):
            scores += more

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the means."""
        k = trainer.datamodule.task.ranking.k
        for metric, scores in self._scores.items():
            known = [0.0 if score == "malformed" else float(score) for score in scores if score != "failed"]
            mean = sum(known) / len(known) if known else math.nan
            pl_module.log(f"val/{metric}@{k}", mean, sync_dist=True)
        malformed = self._scores["ndcg"].count("malformed") / len(self._scores["ndcg"])
        pl_module.log("val/malformed", malformed, sync_dist=True)
