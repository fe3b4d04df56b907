"""Whether a second evaluation differs from a first one on the same targets, and how sure that is.

Shapes: N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

RESAMPLES = 10_000
MANY = 2000
"""Values above which the interval of a mean is not resampled: the bootstrap's is then the normal one."""
_NORMAL = 1.959964
"""Standard deviations from the mean to the ends of a normal 95 % interval."""
_CHUNK = 1_000_000
"""Drawn indices held at once, so that large evaluations fit in memory."""


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of one score.

    Attributes:
        count: Number of pairs.
        before: Mean before.
        after: Mean after.
        gain: Mean of the differences.
        gain_ci95: 95 % confidence interval of the mean difference, see `ci95_of`; None with fewer than two pairs.
        p_value: Two-sided Wilcoxon signed-rank test; None with fewer than two pairs or without any difference.
        rose: Number of pairs that rose.
        fell: Number of pairs that fell.
    """

    count: int
    before: float
    after: float
    gain: float
    gain_ci95: tuple[float, float] | None
    p_value: float | None
    rose: int
    fell: int


def compare(before: np.ndarray, after: np.ndarray, seed: int = 0) -> Comparison:
    """Compare paired scores.

    Args:
        before: (N,) finite scores.
        after: (N,) finite scores of the same targets.
        seed: Of the bootstrap.

    Raises:
        ValueError: There are no pairs, or the lengths differ.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise ValueError(f"expected two equally long rows of scores, got {before.shape} and {after.shape}")
    gains = after - before
    return Comparison(
        count=len(gains),
        before=float(before.mean()),
        after=float(after.mean()),
        gain=float(gains.mean()),
        gain_ci95=ci95_of(gains, "mean", seed),
        p_value=signed_rank(gains),
        rose=int((gains > 0).sum()),
        fell=int((gains < 0).sum()),
    )


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of values (N,), N at least 1, which may be infinite."""
    with np.errstate(invalid="ignore"):
        found = np.percentile(values, [25, 50, 75])
    # between a distance and an infinite one nothing can be interpolated
    low, median, high = np.where(np.isnan(found), np.percentile(values, [25, 50, 75], method="higher"), found)
    return float(low), float(median), float(high)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust the p-values of several tests so that one below 0.05 is wrong in at most 5 % of such families of tests.

    Step-down procedure of Holm (1979), "A simple sequentially rejective multiple test procedure": the k-th smallest of
    m values is multiplied by m − k + 1; none gets smaller than the one before it, and none larger than 1. It needs no
    assumption about how the tests depend on each other.

    Args:
        p_values: One of each test; None where there was nothing to test, which does not count as a test.

    Returns:
        The adjusted values in the same order, None where there was none.

    Raises:
        ValueError: A value is not between 0 and 1.
    """
    tested = [(float(value), place) for place, value in enumerate(p_values) if value is not None]
    if not all(0 <= value <= 1 for value, _ in tested):
        raise ValueError(f"a p-value is not between 0 and 1: {[value for value, _ in tested]}")
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (value, place) in enumerate(sorted(tested)):
        largest = min(1.0, max(largest, value * (len(tested) - rank)))
        adjusted[place] = largest
    return adjusted


def ci95_of(
    values: Sequence[float] | np.ndarray, statistic: Literal["mean", "median"], seed: int = 0
) -> tuple[float, float] | None:
    """95 % confidence interval of mean or median that is as quick for a hundred thousand values as for a hundred.

    Args:
        values: (N,) numbers; of a median they may be infinite.
        statistic: What the interval is of.
        seed: Of the resamples.

    Returns:
        The bootstrap's, of the mean of more than `MANY` values the normal one; None if N < 2.
    """
    values = np.asarray(values, np.float64)
    if statistic == "mean" and len(values) > MANY:
        reach = _NORMAL * float(values.std(ddof=1)) / len(values) ** 0.5
        return float(values.mean()) - reach, float(values.mean()) + reach
    infinite = np.isinf(values)
    if not infinite.any():
        return bootstrap_ci95(values, seed, statistic)
    # ranks are all that a median needs: one step above the largest stands for infinity
    largest = float(values[~infinite].max(initial=0.0)) + 1.0
    bounds = bootstrap_ci95(np.where(infinite, largest, values), seed, statistic)
    if bounds is None:
        return None
    low, high = (np.inf if bound > largest - 1.0 else bound for bound in bounds)
    return float(low), float(high)


def bootstrap_ci95(
    values: Sequence[float] | np.ndarray, seed: int = 0, statistic: Literal["mean", "median"] = "mean"
) -> tuple[float, float] | None:
    """Percentile bootstrap 95 % confidence interval, of 10,000 resamples (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: (N,) finite values.
        seed: Of the resamples.
        statistic: What the interval is of.

    Returns:
        Its ends, or None if N < 2.

    Raises:
        ValueError: The statistic is neither mean nor median.
    """
    if statistic not in ("mean", "median"):
        raise ValueError(f"expected mean or median, got {statistic}")
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None
    resampled = _resampled_means if statistic == "mean" else _resampled_medians
    low, high = np.percentile(resampled(values, np.random.default_rng(seed)), [2.5, 97.5])
    return float(low), float(high)


def _resampled_means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of resamples of values (N,): (RESAMPLES,)."""
    count = len(values)
    means = np.empty(RESAMPLES)
    step = max(1, _CHUNK // count)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        means[start : start + rows] = values[generator.integers(0, count, (rows, count))].mean(axis=1)
    return means


def _resampled_medians(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Medians of resamples of values (N,): (RESAMPLES,).

    A resample's median is one or two of its middle values, and which of the sorted values these are is said by order
    statistics of N uniform numbers. So those alone are drawn, which has the same distribution and costs the same for
    every N (David and Nagaraja 2003, "Order Statistics", sections 2.1 and 2.5).
    """
    ordered, count = np.sort(values), len(values)
    below = (count + 1) // 2  # of N numbers, the lower middle one is that many-th
    lower = generator.beta(below, count - below + 1, RESAMPLES)
    places = [lower]
    if count % 2 == 0:  # the smallest of those above it
        places.append(1 - (1 - lower) * generator.random(RESAMPLES) ** (1 / (count - below)))
    middles = [ordered[np.minimum((place * count).astype(np.int64), count - 1)] for place in places]
    return np.mean(middles, axis=0)


def signed_rank(gains: np.ndarray) -> float | None:
    """Two-sided Wilcoxon signed-rank test of differences (N,), finite; None if N < 2 or all are 0."""
    if len(gains) < 2 or not gains.any():
        return None
    from scipy.stats import wilcoxon

    return float(wilcoxon(gains).pvalue)
