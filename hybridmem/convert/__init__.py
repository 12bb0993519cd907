"""Conversion of pretrained models to HybridMem models with identical logits, with one file per model family."""

from .allocation import Allocation
from .conversion import convert, convert_folder
from .memories import allocate

__all__ = ["Allocation", "allocate", "convert", "convert_folder"]
