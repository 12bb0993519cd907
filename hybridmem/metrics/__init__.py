"""What is measured: torchmetrics that work on their own as well."""

from .allocation import AllocationEntropy
from .bits import BitsPerByte, LossByPosition, document_positions
from .diversity import AttentionDiversity, jensen_shannon
from .needle import NeedleAccuracy
from .span import EffectiveSpan, entropy

__all__ = [
    "AllocationEntropy",
    "AttentionDiversity",
    "BitsPerByte",
    "EffectiveSpan",
    "LossByPosition",
    "NeedleAccuracy",
    "document_positions",
    "entropy",
    "jensen_shannon",
]
