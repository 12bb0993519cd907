"""RULER's synthetic tasks on real text."""

from .ruler import SUBTASKS, Ruler
from .scoring import string_match_all, string_match_part

__all__ = ["SUBTASKS", "Ruler", "string_match_all", "string_match_part"]
