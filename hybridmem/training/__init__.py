"""Lightning modules and callbacks."""

from hybridmem.rl.rollouts.vllm_rollouts import ServedRollouts

from .callbacks.accuracy_by import AccuracyBy
from .callbacks.allocation import AllocationCurve, AllocationMaps, RoutedTokens
from .callbacks.attention_drift import AttentionDrift
from .callbacks.attention_maps import AttentionMaps
from .callbacks.collapse import CollapseGuard
from .callbacks.completion_table import CompletionTable
from .callbacks.compute_spent import ComputeSpent
from .callbacks.format_watch import FormatWatch
from .callbacks.lifecycle import FinalCheckpoint, GracefulStop, RandomState
from .callbacks.memory_probe import MemoryMonitor
from .callbacks.non_finite_guard import NonFiniteGuard
from .callbacks.ranking_scores import RankingScores
from .callbacks.subnetwork_mask import SubnetworkMask
from .checkpoints.durable import DurableCheckpointIO
from .optimizers import MatrixOptimizer, decay_groups
from .policy.module import PolicyModule
from .pretrain import PretrainModule
from .retrofit import RetrofitModule
from .schedules import WarmupCosine, WarmupStableDecay

__all__ = [
    "AccuracyBy",
    "AllocationCurve",
    "AllocationMaps",
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
    "RetrofitModule",
    "RoutedTokens",
    "ServedRollouts",
    "SubnetworkMask",
    "WarmupCosine",
    "WarmupStableDecay",
    "decay_groups",
]
