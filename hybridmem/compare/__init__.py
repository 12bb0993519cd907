"""Architecture against reward: the grid, its runs, its report."""

from .grid import CONTROLS, Comparison

__all__ = ["CONTROLS", "Comparison"]
