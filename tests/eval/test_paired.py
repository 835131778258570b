# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Statistics against independent computations and against what a true null must show."""

import numpy as np
import pytest
from scipy import stats

from modeling_attnres.eval import paired


ONES = np.ones


def coins(rng, n, probability):
    return (rng.random(n) < probability).astype(float)


def test_score_with_equal_weights_is_mean_and_standard_error():
    values = np.random.default_rng(0).normal(size=50)
    mean, se = paired.score(values, ONES(50))
    assert mean == pytest.approx(values.mean(), abs=1e-15)
    assert se == pytest.approx(stats.sem(values), rel=1e-12)


def test_score_with_weights_is_a_ratio_of_sums_with_the_jackknife_error():
    rng = np.random.default_rng(1)
    weights = rng.integers(50, 400, size=200).astype(float)
    values = rng.normal(1.5, 0.2, size=200)
    mean, se = paired.score(values, weights)
    assert mean == pytest.approx((values * weights).sum() / weights.sum(), rel=1e-12)
    left_out = [np.average(np.delete(values, i), weights=np.delete(weights, i)) for i in range(200)]
    jackknife = np.sqrt(199 / 200 * np.sum((left_out - np.mean(left_out)) ** 2))
    assert se == pytest.approx(jackknife, rel=0.02)  # two approximations of the same, to second order


def test_difference_of_equal_weights_is_the_paired_t_test():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 40))
    difference = paired.compare(a, b, ONES(40))
    expected = stats.ttest_rel(b, a)
    interval = expected.confidence_interval(0.95)
    assert difference.value == pytest.approx((b - a).mean())
    assert difference.se == pytest.approx(stats.sem(b - a))
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    assert difference.test == "bootstrap"
    assert difference.p_value == pytest.approx(expected.pvalue, abs=0.02)  # normal data: both tests are right


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 4), (3, 9), (7, 7), (1, 0), (0, 0), (12, 30)])
def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_items(only_a, only_b):
    a = np.array([1] * only_a + [0] * only_b + [1] * 20 + [0] * 5, dtype=float)
    b = np.array([0] * only_a + [1] * only_b + [1] * 20 + [0] * 5, dtype=float)
    difference = paired.compare(a, b, ONES(a.size))
    discordant = only_a + only_b
    expected = stats.binomtest(only_b, discordant, 0.5).pvalue if discordant else 1.0
    assert difference.test == "McNemar"
    assert difference.p_value == pytest.approx(expected, rel=1e-9)


def test_the_case_where_accuracy_and_p_value_disagree():
    """4 items won and none lost of 70: +5.7 points, yet no evidence at 5 %."""
    a = np.array([1] * 34 + [0] * 36, dtype=float)
    b = np.array([1] * 38 + [0] * 32, dtype=float)
    difference = paired.compare(a, b, ONES(70))
    unpaired = np.hypot(paired.score(a, ONES(70))[1], paired.score(b, ONES(70))[1])
    assert difference.value == pytest.approx(4 / 70)
    assert difference.se == pytest.approx(0.028, abs=5e-4)
    assert unpaired == pytest.approx(0.085, abs=5e-4)
    assert difference.p_value == 0.125


def false_positives(p_values) -> float:
    return float(np.mean(np.array(p_values) < 0.05))


def test_1000_null_pairs_mcnemar():
    rng = np.random.default_rng(3)
    p_values = []
    for _ in range(1000):
        ability = rng.beta(2, 2, size=2000)  # items differ in difficulty, models do not
        p_values.append(paired.compare(coins(rng, 2000, ability), coins(rng, 2000, ability), ONES(2000)).p_value)
    assert 0.03 <= false_positives(p_values) <= 0.07


@pytest.mark.parametrize("weighted", [False, True])
def test_1000_null_pairs_bootstrap(weighted):
    rng = np.random.default_rng(4)
    p_values = []
    for index in range(1000):
        item = rng.gamma(4, 0.5, size=60)  # skewed, shared by both models
        a, b = (item + rng.gamma(1, 0.2, size=60) for _ in range(2))
        weights = rng.integers(50, 400, size=60).astype(float) if weighted else ONES(60)
        p_values.append(paired.compare(a, b, weights, resamples=399, seed=index).p_value)
    assert 0.03 <= false_positives(p_values) <= 0.07


def test_1000_null_pairs_stay_inside_their_intervals():
    rng = np.random.default_rng(5)
    outside = 0
    for _ in range(1000):
        ability = rng.beta(2, 2, size=300)
        a, b = (coins(rng, 300, ability) for _ in range(2))
        mean, se = paired.score(b - a, ONES(300))
        outside += abs(mean) > stats.t.ppf(0.975, 299) * se
    assert 0.03 <= outside / 1000 <= 0.07


def test_bootstrap_finds_a_shift_and_repeats_itself():
    rng = np.random.default_rng(6)
    a = rng.gamma(4, 0.5, size=60)
    b = a + rng.normal(0.2, 0.3, size=60)
    first, second = (paired.compare(a, b, ONES(60), resamples=999, seed=9) for _ in range(2))
    assert first.p_value == second.p_value < 0.01
    assert first.low > 0


def test_no_difference_and_constant_difference():
    a = np.linspace(0, 2, 30)
    same = paired.compare(a, a, ONES(30), resamples=99)
    assert (same.value, same.se, same.low, same.high, same.p_value) == (0, 0, 0, 0, 1)
    assert paired.bootstrap_p_value(np.full(30, 0.5), ONES(30), resamples=99, seed=0) == 0.01  # the least of 99


def test_rounding_is_no_difference():
    a = np.random.default_rng(7).gamma(4, 0.5, size=200)
    rounded = paired.compare(a, a * (1 + 1e-7), ONES(200), resamples=99)
    assert (rounded.value, rounded.p_value) == (0, 1)
    assert paired.compare(a, a * (1 + 1e-5), ONES(200), resamples=99).p_value == 0.01


def test_holm_by_hand():
    # Sorted 0.01, 0.03, 0.04 times 3, 2, 1; never below the one before.
    assert paired.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert paired.holm([]) == []


def test_average_of_independent_rows():
    rows = [paired.Difference(0.02, 0.03, 0, 0, 1, "bootstrap"), paired.Difference(0.06, 0.04, 0, 0, 1, "bootstrap")]
    average = paired.average(rows, [1.0, 2.0])
    assert average.value == pytest.approx((0.02 + 0.12) / 2)
    assert average.se == pytest.approx(np.sqrt(0.03**2 + 0.08**2) / 2)
    assert average.p_value == pytest.approx(2 * stats.norm.sf(average.value / average.se))


def test_seed_spread_is_welch():
    a, b = np.array([0.50, 0.52, 0.51]), np.array([0.55, 0.53, 0.56, 0.54])
    spread = paired.seed_spread(a, b)
    expected = stats.ttest_ind(b, a, equal_var=False)
    assert (spread.baseline, spread.variant) == pytest.approx((a.std(ddof=1), b.std(ddof=1)))
    assert spread.p_value == pytest.approx(expected.pvalue)
    assert spread.low < b.mean() - a.mean() < spread.high
    single = paired.seed_spread(a[:1], b)
    assert (single.baseline, single.low) == (None, None)
