"""Lightning modules, callbacks and the command line."""

from .callbacks import GracefulStop, MemoryMonitor, RandomState
from .optimizers import MatrixOptimizer, decay_groups
from .policy import PolicyModule
from .pretrain import PretrainModule
from .schedules import WarmupCosine, WarmupStableDecay

__all__ = [
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
