"""Means over seeds with confidence intervals."""

import math
import statistics
from collections.abc import Sequence

# 97.5 % points of Student's t with 1, 2, … degrees of freedom
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NORMAL = 1.96


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of Student's 95 % confidence interval, or None for the latter if one value."""
    if len(values) < 2:
        return values[0], None
    freedom = len(values) - 1
    t = STUDENT_T[freedom - 1] if freedom <= len(STUDENT_T) else NORMAL
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))
