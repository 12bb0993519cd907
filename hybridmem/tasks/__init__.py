"""Tasks whose answers can be checked."""

from .needle import NeedleRows

__all__ = ["NeedleRows"]
