"""Pretrained models of other families become HybridMem models with the same logits; a file a family."""

from .allocation import Allocation
from .conversion import convert, convert_folder
from .memories import allocate

__all__ = ["Allocation", "allocate", "convert", "convert_folder"]
