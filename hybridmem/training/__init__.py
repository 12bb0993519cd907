"""Lightning modules, callbacks and the command line."""

from .accuracy_by import AccuracyBy
from .attention_drift import AttentionDrift
from .attention_maps import AttentionMaps
from .callbacks import GracefulStop, MemoryMonitor, RandomState
from .collapse import CollapseGuard
from .compute_spent import ComputeSpent
from .optimizers import MatrixOptimizer, decay_groups
from .policy import PolicyModule
from .pretrain import PretrainModule
from .samples import CompletionTable
from .schedules import WarmupCosine, WarmupStableDecay

__all__ = [
    "AccuracyBy",
    "AttentionDrift",
    "AttentionMaps",
    "CollapseGuard",
    "CompletionTable",
    "ComputeSpent",
    "GracefulStop",
    "MatrixOptimizer",
    "MemoryMonitor",
    "PolicyModule",
    "PretrainModule",
    "RandomState",
    "WarmupCosine",
    "WarmupStableDecay",
    "decay_groups",
]
