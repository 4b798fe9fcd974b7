"""Intervals of means of a few networks: by Student's t, which holds for as few as five of them.

A bootstrap over five networks misses the mean three times as often as it says.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95

FEWEST = 5
"""With fewer networks of a method nothing is claimed of it."""


def interval_of_mean(values_R: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the mean; NaN of fewer than two values, the mean itself of values that are all alike."""
    if len(values_R) < 2:
        return float("nan"), float("nan")
    error = float(values_R.std(ddof=1)) / len(values_R) ** 0.5
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values_R) - 1)) * error
    return float(values_R.mean()) - reach, float(values_R.mean()) + reach


def difference(first_R: NDArray[np.float64], second_R: NDArray[np.float64]) -> tuple[float, float, float]:
    """Difference of two means and its 95 % interval (Welch, whose samples may vary differently)."""
    gap = float(first_R.mean() - second_R.mean())
    if min(len(first_R), len(second_R)) < 2:
        return gap, float("nan"), float("nan")
    errors = [float(values.var(ddof=1)) / len(values) for values in (first_R, second_R)]
    if not sum(errors):
        return gap, gap, gap
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(values) - 1) for error, values in zip(errors, (first_R, second_R), strict=True)
    )
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * sum(errors) ** 0.5
    return gap, gap - reach, gap + reach
