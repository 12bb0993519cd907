"""Lightning modules and callbacks."""

from .accuracy_by import AccuracyBy
from .attention_drift import AttentionDrift
from .attention_maps import AttentionMaps
from .callbacks import FinalCheckpoint, GracefulStop, MemoryMonitor, RandomState
from .collapse import CollapseGuard
from .compute_spent import ComputeSpent
from .durable import DurableCheckpointIO
from .format_watch import FormatWatch
from .nonfinite import NonFiniteGuard
from .optimizers import MatrixOptimizer, decay_groups
from .policy import PolicyModule
from .pretrain import PretrainModule
from .ranking_scores import RankingScores
from .samples import CompletionTable
from .schedules import WarmupCosine, WarmupStableDecay
from .served import ServedRollouts
from .subnetwork import SubnetworkMask

__all__ = [
    "AccuracyBy",
    "AttentionDrift",
    "AttentionMaps",
    "CollapseGuard",
    "CompletionTable",
    "ComputeSpent",
    "DurableCheckpointIO",
    "FinalCheckpoint",
    "FormatWatch",
    "GracefulStop",
    "MatrixOptimizer",
    "MemoryMonitor",
    "NonFiniteGuard",
    "PolicyModule",
    "PretrainModule",
    "RandomState",
    "RankingScores",
    "ServedRollouts",
    "SubnetworkMask",
    "WarmupCosine",
    "WarmupStableDecay",
    "decay_groups",
]
