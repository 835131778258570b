# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import math
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from seeds import interval, spread


def test_the_interval_is_students():
    """Of 1, 2, 3: standard deviation 1, and the quantile of two degrees of freedom is 4.3027."""
    assert spread([1, 2, 3]) == pytest.approx(1)
    assert interval([1, 2, 3]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_one_value_has_no_spread():
    assert math.isnan(spread([1.0]))
    assert all(math.isnan(bound) for bound in interval([1.0]))
