"""What is measured: torchmetrics that work on their own as well."""

from .bits import BitsPerByte, LossByPosition, document_positions
from .needle import NeedleAccuracy
from .span import EffectiveSpan, entropy

__all__ = ["BitsPerByte", "EffectiveSpan", "LossByPosition", "NeedleAccuracy", "document_positions", "entropy"]
