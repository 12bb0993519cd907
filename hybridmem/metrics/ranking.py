"""Quality of ranked lists: NDCG, recall and reciprocal rank of the first k documents.

A document's relevance is at least 0, and 0 for documents without an entry. A document that appears twice in a list
counts only at its first position.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

RankingMetric = Callable[[Sequence[str], Mapping[str, float], int], float]


def ndcg(ranking: Sequence[str], relevance: Mapping[str, float], k: int) -> float:
    """Compute the normalised discounted cumulative gain.

    This is Σ_r relevance_r / log2(r + 1) over ranks r ≤ k, divided by the best possible; 0 if nothing is relevant.
    """
    best = _dcg(sorted(relevance.values(), reverse=True)[:k])
    return _dcg(_gains(ranking, relevance, k)) / best if best else 0.0


def recall(ranking: Sequence[str], relevance: Mapping[str, float], k: int) -> float:
    """Compute the share of all relevant documents that are among the first k; 0 if nothing is relevant."""
    relevant = sum(gain > 0 for gain in relevance.values())
    return sum(gain > 0 for gain in _gains(ranking, relevance, k)) / relevant if relevant else 0.0


def mrr(ranking: Sequence[str], relevance: Mapping[str, float], k: int) -> float:
    """Compute 1 / rank of the first relevant document, 0 if not among the first k; the mean over queries is the MRR."""
    gains = _gains(ranking, relevance, k)
    return next((1 / rank for rank, gain in enumerate(gains, start=1) if gain > 0), 0.0)


RANKING_METRICS: dict[str, RankingMetric] = {"ndcg": ndcg, "recall": recall, "mrr": mrr}


def _gains(ranking: Sequence[str], relevance: Mapping[str, float], k: int) -> list[float]:
    return [relevance.get(document, 0.0) for document in islice(dict.fromkeys(ranking), k)]


def _dcg(gains: Sequence[float]) -> float:
    return math.fsum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
