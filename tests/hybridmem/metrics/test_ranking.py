"""Ranking metrics, compared with values computed by hand, scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score
from torchmetrics.functional.retrieval import (
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from hybridmem.metrics import mrr, ndcg, recall

RANKING = ["a", "b", "c", "d"]


def test_by_hand():
    """Relevant are b and d, at ranks 2 and 4, and x, which is not retrieved."""
    relevance = {"b": 1.0, "d": 1.0, "x": 1.0}
    best = 1 + 1 / np.log2(3) + 1 / np.log2(4)
    assert ndcg(RANKING, relevance, 4) == pytest.approx((1 / np.log2(3) + 1 / np.log2(5)) / best)
    assert ndcg(RANKING, relevance, 2) == pytest.approx(1 / np.log2(3) / (1 + 1 / np.log2(3)))
    assert recall(RANKING, relevance, 4) == pytest.approx(2 / 3)
    assert recall(RANKING, relevance, 1) == 0
    assert mrr(RANKING, relevance, 4) == 1 / 2
    assert mrr(RANKING, relevance, 1) == 0


@pytest.mark.parametrize("metric", [ndcg, recall, mrr])
def test_nothing_relevant_is_0(metric):
    assert metric(RANKING, {}, 3) == 0
    assert metric(RANKING, {"a": 0.0}, 3) == 0
    assert metric([], {"a": 1.0}, 3) == 0


@pytest.mark.parametrize("metric", [ndcg, recall, mrr])
def test_a_document_counts_once(metric):
    relevance = {"a": 1.0, "b": 1.0}
    assert metric(["c", "a", "a", "b"], relevance, 3) == metric(["c", "a", "b"], relevance, 3)


@pytest.mark.parametrize("k", [1, 3, 10, 20])
@pytest.mark.parametrize("graded", [False, True])
def test_as_scikit_learn_and_torchmetrics_have_them(k, graded):
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.permutation(12) + 1.0
        gains = rng.integers(0, 4 if graded else 2, 12)
        gains[rng.integers(12)] = 1
        ranking = [str(document) for document in np.argsort(-scores)]
        relevance = {str(document): float(gain) for document, gain in enumerate(gains)}
        target, preds = torch.tensor(gains), torch.tensor(scores)
        found = ndcg(ranking, relevance, k)
        assert found == pytest.approx(ndcg_score(gains[None], scores[None], k=k))
        top_k = min(k, 12)
        assert found == pytest.approx(retrieval_normalized_dcg(preds, target, top_k=top_k).item(), abs=1e-6)
        if not graded:
            assert recall(ranking, relevance, k) == pytest.approx(retrieval_recall(preds, target, top_k=top_k).item())
            reciprocal = retrieval_reciprocal_rank(preds, target, top_k=top_k).item()
            assert mrr(ranking, relevance, k) == pytest.approx(reciprocal)


def test_mrr_of_one_relevant_document_is_its_average_precision():
    scores, gains = np.array([[0.3, 0.9, 0.5]]), np.array([[0, 0, 1]])
    expected = label_ranking_average_precision_score(gains, scores)
    assert mrr(["1", "2", "0"], {"2": 1.0}, 3) == pytest.approx(expected)
