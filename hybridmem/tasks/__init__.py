"""Tasks with verifiable answers."""

from .facts import Facts
from .identifier import Identifier
from .needle import NeedleRows
from .product_search import ProductSearch
from .query import Query
from .recall import Recall
from .repair import Repair
from .ruler import Ruler
from .swe_bench import SWEBench
from .task import Task
from .two_formats import TwoFormats
from .visual_search import VisualSearch
from .workspace import Workspace

__all__ = [
    "Facts",
    "Identifier",
    "NeedleRows",
    "ProductSearch",
    "Query",
    "Recall",
    "Repair",
    "Ruler",
    "SWEBench",
    "Task",
    "TwoFormats",
    "VisualSearch",
    "Workspace",
]
