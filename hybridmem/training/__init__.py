"""Lightning modules, callbacks and the command line."""

from .callbacks import GracefulStop, MemoryMonitor, RandomState
from .optimizers import MatrixOptimizer, decay_groups
from .pretrain import PretrainModule
from .schedules import WarmupCosine, WarmupStableDecay

__all__ = [
    "GracefulStop",
    "MatrixOptimizer",
    "MemoryMonitor",
    "PretrainModule",
    "RandomState",
    "WarmupCosine",
    "WarmupStableDecay",
    "decay_groups",
]
