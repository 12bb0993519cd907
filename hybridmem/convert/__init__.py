"""Conversion of pretrained models to HybridMem models with identical logits, with one file per model family."""

from .conversion import convert, convert_folder

__all__ = ["convert", "convert_folder"]
