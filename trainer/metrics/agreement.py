"""Whether predicted sizes, such as a patient's tumour burden, agree with the true ones.

Shapes: N cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LIMIT = 1.96
"""Standard deviations between the bias and a limit of agreement."""


@dataclass(frozen=True)
class Agreement:
    """Correlation and Bland–Altman analysis of N predicted sizes and the true ones, in the unit of the sizes.

    Attributes:
        count: N.
        pearson_r: Pearson's correlation; None with fewer than three cases, or where all of one side are alike.
        p_value: Two-sided, of no correlation.
        r_ci95: 95 % confidence interval of r by Fisher's transformation; None with fewer than four cases.
        bias: Mean of predicted − true: above 0 where predictions are too large.
        bias_ci95: 95 % confidence interval of the bias, by Student's t; None with one case.
        limits: Limits of agreement, bias ± 1.96 standard deviations of the differences: about 95 % of the cases lie
            between them if differences are normally distributed; None with one case.
        slope: Proportional bias: by how much the difference grows with each unit of size, the mean of predicted and
            true; None with fewer than three cases, or where all of these means are alike.
        slope_p_value: Two-sided, of no slope.
    """

    count: int
    pearson_r: float | None
    p_value: float | None
    r_ci95: tuple[float, float] | None
    bias: float
    bias_ci95: tuple[float, float] | None
    limits: tuple[float, float] | None
    slope: float | None
    slope_p_value: float | None


def agreement(predicted: Sequence[float] | np.ndarray, true: Sequence[float] | np.ndarray) -> Agreement:
    """Compare predicted sizes, such as volumes in ml, with the true ones.

    A high correlation alone is no agreement: predictions that are all twice too large correlate perfectly. So bias,
    limits and proportional bias stand beside it (Bland and Altman 1986, 1999).

    Args:
        predicted: (N,) finite sizes.
        true: (N,) finite sizes of the same cases.

    Raises:
        ValueError: There are no cases, the lengths differ, or a size is not finite.
    """
    predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    if predicted.shape != true.shape or predicted.ndim != 1 or not predicted.size:
        raise ValueError(f"expected two equally long rows of sizes, got {predicted.shape} and {true.shape}")
    if not (np.isfinite(predicted).all() and np.isfinite(true).all()):
        raise ValueError("expected finite sizes")
    differences = predicted - true
    count, bias = len(differences), float(differences.mean())
    deviation = float(differences.std(ddof=1)) if count > 1 else None
    r, p_value, r_ci95 = _correlation(predicted, true)
    slope, slope_p_value = _proportional_bias(differences, (predicted + true) / 2)
    return Agreement(
        count=count,
        pearson_r=r,
        p_value=p_value,
        r_ci95=r_ci95,
        bias=bias,
        bias_ci95=None if deviation is None else _around(bias, _student(count) * deviation / count**0.5),
        limits=None if deviation is None else _around(bias, LIMIT * deviation),
        slope=slope,
        slope_p_value=slope_p_value,
    )


def _around(middle: float, half: float) -> tuple[float, float]:
    return middle - half, middle + half


def _student(count: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, count - 1))


def _correlation(
    predicted: np.ndarray, true: np.ndarray
) -> tuple[float | None, float | None, tuple[float, float] | None]:
    """Pearson's r, its p-value and Fisher's interval."""
    if len(true) < 3 or not np.ptp(predicted) or not np.ptp(true):
        return None, None, None
    from scipy.stats import pearsonr

    found = pearsonr(predicted, true)
    r = float(found.statistic)
    if len(true) < 4:  # the transformed r has a standard error of 1 / √(N − 3)
        return r, float(found.pvalue), None
    with np.errstate(divide="ignore"):  # of a perfect correlation the interval is that value
        low, high = found.confidence_interval(0.95)
    return r, float(found.pvalue), (float(low), float(high))


def _proportional_bias(differences: np.ndarray, means: np.ndarray) -> tuple[float | None, float | None]:
    """Slope of the differences over the means by least squares, and its p-value."""
    if len(means) < 3 or not np.ptp(means):
        return None, None
    if not np.ptp(differences):  # without any scatter there is nothing to test
        return 0.0, 1.0
    from scipy.stats import linregress

    found = linregress(means, differences)
    return float(found.slope), float(found.pvalue)
