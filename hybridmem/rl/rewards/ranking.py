"""Ranking metrics as rewards (Rec-R1, arXiv 2503.24289): the response is a query, and its results are scored.

<think>…</think><answer>{"query": "…"}</answer>         or, with think=False, the answer alone
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hybridmem.checks import at_least, one_of
from hybridmem.metrics.ranking import RANKING_METRICS

from .functions import Completion
from .retrievers import Found, Retriever, checked

ANSWER = r"\s*<answer>((?:(?!</?answer>|</?think>).)*)</answer>\s*"
THINK = r"\s*<think>(?:(?!</?answer>|</?think>).)*</think>"
FORMAT_REWARD = 0.1  # added to metrics above 0
MALFORMED = -2.0

Relevance = Mapping[str, float] | Sequence[str]  # relevance by document id, or the ids with relevance 1

logger = logging.getLogger(__name__)


class RankingReward:
    """Rec-R1's reward: 0.1 + metric if a query finds relevant documents, 0 if not, and −2 for a malformed response.

    A call sends its distinct queries to the retriever in one batch. The retriever fails on a query if it returns None,
    raises, or returns anything but lists of ids. A failed query gets `failed_reward` and increments `failures`.

    Args:
        metric: `ndcg`, `recall` or `mrr`.
        k: the cutoff of the metric, in documents.
        retriever: `retriever(queries, k)` returns a list of ids per query (see hybridmem.rl.rewards.retrievers).
        think: True if a response must contain <think>…</think> before its answer.
        relevance_column: the dataset's column with a mapping from document id to relevance, or with the ids of the
            relevant documents.
        failed_reward: the reward of failed queries. The default is the reward of a query without relevant results;
            None leaves the sample to the other reward functions.
        raise_failures: raise an error instead of giving failed_reward.

    Raises:
        ValueError: The metric is unknown, or k is below 1.
    """

    def __init__(
        self,
        metric: str,
        k: int,
        retriever: Retriever,
        think: bool = True,
        relevance_column: str = "relevance",
        failed_reward: float | None = 0.0,
        raise_failures: bool = False,
    ):
        one_of(tuple(RANKING_METRICS), metric=metric)
        at_least(1, k=k)
        self.metric, self.k, self.retriever, self.think = metric, k, retriever, think
        self.relevance_column, self.failed_reward = relevance_column, failed_reward
        self.raise_failures = raise_failures
        self.failures = 0
        self.__name__ = f"{metric}@{k}"  # the name in the log

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """Return the reward of each completion."""
        (scores,) = self.scores(completions, self.metric, **columns)
        return [self._reward(score) for score in scores]

    def scores(self, completions: Sequence[Completion], *metrics: str, **columns: Any) -> list[list[float | str]]:
        """Return, for each metric, a score per completion, or `malformed` or `failed` in place of the score.

        Raises:
            ValueError: The dataset lacks relevance_column.
        """
        if self.relevance_column not in columns:
            raise ValueError(
                f"relevance_column={self.relevance_column!r} is not among the dataset's columns {list(columns)}; set "
                "it to one of them"
            )
        queries = [parse_query(completion, self.think) for completion in completions]
        found = self.search(list(dict.fromkeys(query for query in queries if query is not None)))
        relevances = columns[self.relevance_column]
        return [
            [
                "malformed" if query is None else self._score(metric, found[query], relevance)
                for query, relevance in zip(queries, relevances, strict=True)
            ]
            for metric in metrics
        ]

    def search(self, queries: list[str]) -> dict[str, list[str] | None]:
        """Return the document ids found for each query, or None if the retriever failed on it."""
        found: Found = []
        if queries:
            try:
                found = checked(self.retriever(queries, self.k), len(queries), self.k)
            except Exception as error:
                if self.raise_failures:
                    raise
                logger.warning("retriever failed on %d queries: %s: %s", len(queries), type(error).__name__, error)
                found = [None] * len(queries)
        failed = sum(ids is None for ids in found)
        self.failures += failed
        if failed and self.raise_failures:
            raise RuntimeError(f"the retriever failed on {failed} of {len(queries)} queries")
        return dict(zip(queries, found, strict=True))

    def _score(self, metric: str, found: list[str] | None, relevance: Relevance) -> float | str:
        if found is None:
            return "failed"
        graded = relevance if isinstance(relevance, Mapping) else dict.fromkeys(relevance, 1.0)
        return RANKING_METRICS[metric](found, graded, self.k)

    def _reward(self, score: float | str) -> float | None:
        if isinstance(score, str):
            return MALFORMED if score == "malformed" else self.failed_reward
        return FORMAT_REWARD + score if score > 0 else 0.0


def parse_query(completion: Completion, think: bool = True) -> str | None:
    """Return the query in a completion or in its last message, or None if the completion is malformed."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    match = re.fullmatch((THINK if think else "") + ANSWER, text, re.DOTALL)
    if match is None:
        return None
    try:
        answer = json.loads(match[1])
    except (ValueError, RecursionError):
        return None
    query = answer.get("query") if isinstance(answer, dict) else None
    return query if isinstance(query, str) else None


def write_answer(query: str, think: str | None = None) -> str:
    """Format a query as a response that `parse_query` reads."""
    thought = "" if think is None else f"<think>{think}</think>"
    return f"{thought}<answer>{json.dumps({'query': query})}</answer>"
