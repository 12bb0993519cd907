"""Metrics as torchmetrics classes and functions, usable independently of the rest of the package."""

from .bits import BitsPerByte, LossByPosition, document_positions
from .distance import BeyondWindow, MeanDistance
from .diversity import AttentionDiversity, DistinctPatterns, jensen_shannon
from .entropy import AllocationEntropy, EffectiveSpan, entropy
from .formats import FormatShare
from .interval import mean_interval
from .needle import NeedleAccuracy
from .pass_at_k import MajAtK, PassAtK, maj_at_k, pass_at_k
from .ranking import mrr, ndcg, recall
from .retention import RetentionHalfLife, retention_half_life
from .subnetwork import subnetwork_overlap, update_masks, update_rank, update_sparsity
from .weights import StoredWeights

__all__ = [
    "AllocationEntropy",
    "AttentionDiversity",
    "BeyondWindow",
    "BitsPerByte",
    "DistinctPatterns",
    "EffectiveSpan",
    "FormatShare",
    "LossByPosition",
    "MajAtK",
    "MeanDistance",
    "NeedleAccuracy",
    "PassAtK",
    "RetentionHalfLife",
    "StoredWeights",
    "document_positions",
    "entropy",
    "jensen_shannon",
    "maj_at_k",
    "mean_interval",
    "mrr",
    "ndcg",
    "pass_at_k",
    "recall",
    "retention_half_life",
    "subnetwork_overlap",
    "update_masks",
    "update_rank",
    "update_sparsity",
]
