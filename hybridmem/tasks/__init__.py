"""Tasks whose answers can be checked."""

from .identifier import Identifier
from .needle import NeedleRows
from .recall import Recall
from .task import Task
from .visual_search import VisualSearch

__all__ = ["Identifier", "NeedleRows", "Recall", "Task", "VisualSearch"]
