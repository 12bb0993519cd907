"""The operators under hybridmem: a neural memory's scans, needing nothing but torch."""

from .memory_mlp_scan import MemoryMLPState, memory_mlp, memory_mlp_scan
from .memory_scan import MemoryState, memory_scan

__all__ = ["MemoryMLPState", "MemoryState", "memory_mlp", "memory_mlp_scan", "memory_scan"]
