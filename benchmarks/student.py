"""How far means of a few measurements may be off."""

import math
import statistics
from collections.abc import Sequence

T_ONE_SIDED_95 = {
    1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833, 10: 1.812, 11: 1.796,
    12: 1.782, 13: 1.771, 14: 1.761, 15: 1.753, 16: 1.746, 17: 1.740, 18: 1.734, 19: 1.729, 20: 1.725, 21: 1.721,
    22: 1.717, 23: 1.714, 24: 1.711, 25: 1.708, 26: 1.706, 27: 1.703, 28: 1.701, 29: 1.699, 30: 1.697, 40: 1.684,
    60: 1.671, 120: 1.658,
}  # fmt: skip
"""Quantile of Student's t by degrees of freedom."""


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; one value does not tell."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def quantile_95(freedom: int) -> float:
    """One-sided 95% quantile of Student's t; between entries that of fewer degrees of freedom, a little wide."""
    return T_ONE_SIDED_95[max(known for known in T_ONE_SIDED_95 if known <= freedom)]


def margin_95(values: Sequence[float]) -> float:
    """How far the mean of at least two values may be from the true one, on either side with a chance of 5%."""
    return quantile_95(len(values) - 1) * standard_error(values)
