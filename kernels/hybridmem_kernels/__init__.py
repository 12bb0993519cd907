"""Operators of hybridmem: scans of neural memories and divergences of attention policies; they require only torch."""

from .attention_divergence import AttentionStats, attention_divergence
from .dispatch import use_backend
from .memory_mlp_scan import MemoryMLPState, memory_mlp, memory_mlp_scan
from .memory_scan import MemoryState, memory_scan

__all__ = [
    "AttentionStats",
    "MemoryMLPState",
    "MemoryState",
    "attention_divergence",
    "memory_mlp",
    "memory_mlp_scan",
    "memory_scan",
    "use_backend",
]
