# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What the studies say of values over seeds."""

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def spread(values: Sequence[float]) -> float:
    """The standard deviation of a sample; NaN of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean by Student's t; NaN of fewer than two values."""
    mean = statistics.fmean(values)
    half = stats.t.ppf(0.975, max(1, len(values) - 1)) * spread(values) / math.sqrt(len(values))
    return mean - float(half), mean + float(half)
