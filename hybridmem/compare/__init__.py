"""Comparison of architectures and rewards: a grid, its runs and its report."""

from .grid import CONTROLS, Comparison

__all__ = ["CONTROLS", "Comparison"]
