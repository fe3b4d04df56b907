"""Whether a second evaluation differs from a first one on the same targets.

Shapes: N targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
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
        gain_ci95: Bootstrap 95 % confidence interval of the mean difference; None with fewer than two pairs.
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
        gain_ci95=bootstrap_ci95(gains, seed),
        p_value=_wilcoxon(gains),
        rose=int((gains > 0).sum()),
        fell=int((gains < 0).sum()),
    )


def bootstrap_ci95(values: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of values (N,), or None if N < 2."""
    count = len(values)
    if count < 2:
        return None
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    step = max(1, _CHUNK // count)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        means[start : start + rows] = values[generator.integers(0, count, (rows, count))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _wilcoxon(gains: np.ndarray) -> float | None:
    if len(gains) < 2 or not gains.any():
        return None
    from scipy.stats import wilcoxon

    return float(wilcoxon(gains).pvalue)
