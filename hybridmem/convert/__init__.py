"""Pretrained models of other families become HybridMem models with the same logits; a file a family."""

from .conversion import convert, convert_folder

__all__ = ["convert", "convert_folder"]
