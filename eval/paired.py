# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Paired statistics of two models on the same items. Sums are weighted, so that bits per byte are covered too.

Letters: n items, v values, w weights, R = sum(w v) / sum(w) the score.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests


LEVEL = 0.95
# Log-likelihoods are float32 sums. Relative differences below this are rounding, which a test on many items would find
# significant however small it is, so they count as none.
ROUNDING = 1e-6
# Elements of one batch of bootstrap resamples: 64 MB of float64.
BATCH_ELEMENTS = 8_000_000


@dataclass(frozen=True)
class Difference:
    """
    Args:
        value: variant minus baseline.
        se: its standard error over items, pairing each item with itself.
        low: of the 95 % confidence interval, by Student's t with n - 1 degrees of freedom.
        high: of the same.
        p_value: two-sided, of no difference.
        test: `"McNemar"` or `"bootstrap"`.
    """

    value: float
    se: float
    low: float
    high: float
    p_value: float
    test: str


def score(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weighted mean over the last axis and its standard error, by linearisation of the ratio.

    With equal weights the error is the sample's standard deviation over the square root of n.

    Args:
        values: `[..., n]`, n at least 2.
        weights: `[..., n]`, positive.
    """
    n = values.shape[-1]
    total = weights.sum(-1)
    mean = (values * weights).sum(-1) / total
    residuals = weights * (values - mean[..., None])
    return mean, np.sqrt(n / (n - 1) * (residuals**2).sum(-1)) / total


def bootstrap_p_value(differences: np.ndarray, weights: np.ndarray, resamples: int, seed: int) -> float:
    """Two-sided p-value of a zero mean by the studentised paired bootstrap.

    The observed |mean / se| is placed among those of resamples of items, centred on the observed mean.

    Args:
        differences: `[n]`, variant minus baseline.
        weights: `[n]`.
    """
    mean, se = score(differences, weights)
    if not differences.any():
        return 1.0
    observed = np.divide(abs(mean), se, out=np.full((), np.inf), where=se > 0)

    def studentised(values: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
        resampled_mean, resampled_se = score(values, weights)
        distance = np.abs(resampled_mean - mean)
        # A resample of one item repeated has no spread: no distance, or one without measure.
        without_spread = np.where(distance > 0, np.inf, 0.0)
        return np.divide(distance, resampled_se, out=without_spread, where=resampled_se > 0)

    with np.errstate(invalid="ignore"):  # SciPy also takes the distribution's own deviation, infinities or not
        drawn = stats.bootstrap(
            (differences, weights),
            studentised,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, BATCH_ELEMENTS // differences.size),
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    # Rounding must not turn ties with the observed value into smaller ones.
    return float((1 + np.count_nonzero(drawn >= observed * (1 - 1e-9))) / (resamples + 1))


def mcnemar_p_value(baseline: np.ndarray, variant: np.ndarray) -> float:
    """Exact two-sided McNemar p-value of two arrays `[n]` of zeros and ones."""
    table = [[np.sum((baseline == a) & (variant == b)) for b in (1, 0)] for a in (1, 0)]
    return float(min(mcnemar(table, exact=True).pvalue, 1.0))


def compare(
    baseline: np.ndarray, variant: np.ndarray, weights: np.ndarray, resamples: int = 9999, seed: int = 0
) -> Difference:
    """The paired difference of two models.

    Args:
        baseline: `[n]` values; zeros and ones on both sides are tested by McNemar's exact test, others by bootstrap.
        variant: `[n]` values of the same items.
        weights: `[n]`.
    """
    differences = variant - baseline
    differences[np.abs(differences) <= ROUNDING * np.maximum(np.abs(baseline), np.abs(variant))] = 0
    value, se = score(differences, weights)
    half = stats.t.ppf((1 + LEVEL) / 2, differences.size - 1) * se
    binary = all(np.isin(array, (0, 1)).all() for array in (baseline, variant, weights))
    if binary:
        p_value = mcnemar_p_value(baseline, variant)
    else:
        p_value = bootstrap_p_value(differences, weights, resamples, seed)
    test = "McNemar" if binary else "bootstrap"
    return Difference(float(value), float(se), float(value - half), float(value + half), p_value, test)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction of a family of p-values."""
    return multipletests(p_values, method="holm")[1].tolist() if p_values else []


def average(differences: list[Difference], scales: list[float]) -> Difference:
    """The mean of independent differences, each times its scale: for macro averages over tasks.

    Its interval and p-value are the normal distribution's.
    """
    value = float(np.mean([scale * item.value for item, scale in zip(differences, scales)]))
    se = float(np.sqrt(np.sum([(scale * item.se) ** 2 for item, scale in zip(differences, scales)])) / len(scales))
    half = stats.norm.ppf((1 + LEVEL) / 2) * se
    p_value = float(2 * stats.norm.sf(abs(value) / se)) if se > 0 else float(value == 0)
    return Difference(value, se, value - float(half), value + float(half), p_value, "normal")


@dataclass(frozen=True)
class SeedSpread:
    """
    Args:
        baseline: standard deviation of the score over the baseline's training seeds; `None` for a single one.
        variant: the same of the variant.
        low: of Welch's 95 % interval for the difference of the means over seeds; `None` unless both have several.
        high: of the same.
        p_value: Welch's, of the same.
    """

    baseline: float | None
    variant: float | None
    low: float | None
    high: float | None
    p_value: float | None


def seed_spread(baseline: np.ndarray, variant: np.ndarray) -> SeedSpread:
    """How far scores vary between training seeds, the items being the same.

    Args:
        baseline: `[seeds]` scores.
        variant: `[seeds]` scores, of other seeds, as many or not.
    """
    deviations = [float(np.std(scores, ddof=1)) if scores.size > 1 else None for scores in (baseline, variant)]
    if None in deviations or not any(deviations):
        return SeedSpread(*deviations, None, None, None)
    result = stats.ttest_ind(variant, baseline, equal_var=False)
    interval = result.confidence_interval(LEVEL)
    return SeedSpread(*deviations, float(interval.low), float(interval.high), float(result.pvalue))
