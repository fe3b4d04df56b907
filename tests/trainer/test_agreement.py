"""Agreement of sizes by hand, and against SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from trainer.metrics import agreement


def test_bland_altman_by_hand() -> None:
    """Differences 1, 3, −1, 1: mean 1, sum of squares around it 8, so a standard deviation of √(8/3)."""
    found = agreement([11, 23, 29, 41], [10, 20, 30, 40])
    assert found.count == 4
    assert found.bias == 1, "predictions are too large on average"
    deviation = math.sqrt(8 / 3)
    assert found.limits == pytest.approx((1 - 1.96 * deviation, 1 + 1.96 * deviation))
    half = 3.182446305 * deviation / 2  # Student's t of 3 degrees of freedom, 97.5 %
    assert found.bias_ci95 == pytest.approx((1 - half, 1 + half))


def test_correlation_against_scipy_and_by_fishers_formula() -> None:
    rng = np.random.default_rng(0)
    true = rng.lognormal(2, 1, 40)
    predicted = true * rng.normal(1.1, 0.2, 40)
    found = agreement(predicted, true)
    expected = stats.pearsonr(predicted, true)
    assert found.pearson_r == pytest.approx(expected.statistic, abs=1e-12)
    assert found.p_value == pytest.approx(expected.pvalue)
    r = np.corrcoef(predicted, true)[0, 1]
    assert found.pearson_r == pytest.approx(r, abs=1e-12)
    ends = (math.tanh(math.atanh(r) + side * stats.norm.ppf(0.975) / math.sqrt(37)) for side in (-1, 1))
    assert found.r_ci95 == pytest.approx(tuple(ends), abs=1e-12)


def test_limits_hold_95_percent_of_normal_differences() -> None:
    rng = np.random.default_rng(1)
    true = rng.uniform(10, 100, 20_000)
    predicted = true + rng.normal(-3, 2, true.size)
    found = agreement(predicted, true)
    low, high = found.limits
    assert np.mean((predicted - true > low) & (predicted - true < high)) == pytest.approx(0.95, abs=0.005)
    assert found.bias_ci95[0] < -3 < found.bias_ci95[1] < -2.9
    assert abs(found.slope) < 0.01


def test_a_perfect_correlation_is_no_agreement() -> None:
    true = np.array([10.0, 20.0, 40.0, 80.0, 100.0])
    found = agreement(2 * true, true)
    assert found.pearson_r == pytest.approx(1)
    assert found.r_ci95 == pytest.approx((1, 1))
    assert found.bias == 50
    assert found.slope == pytest.approx(2 / 3), "a difference of x at a mean of 1.5 x"
    assert found.slope_p_value < 1e-6


def test_proportional_bias_against_scipy() -> None:
    rng = np.random.default_rng(2)
    true = rng.uniform(5, 50, 30)
    predicted = 0.8 * true + rng.normal(4, 2, 30)
    found = agreement(predicted, true)
    expected = stats.linregress((predicted + true) / 2, predicted - true)
    assert (found.slope, found.slope_p_value) == pytest.approx((expected.slope, expected.pvalue))
    assert found.slope < 0, "large ones are made too small, small ones too large"


def test_what_too_few_cases_cannot_say_is_none() -> None:
    one = agreement([3.0], [2.0])
    assert (one.count, one.bias) == (1, 1)
    assert {one.pearson_r, one.p_value, one.r_ci95, one.bias_ci95, one.limits, one.slope, one.slope_p_value} == {None}
    two = agreement([3.0, 5.0], [2.0, 6.0])
    assert (two.bias, two.pearson_r, two.slope) == (0, None, None)
    assert two.limits == pytest.approx((-1.96 * math.sqrt(2), 1.96 * math.sqrt(2)))
    three = agreement([3.0, 5.0, 8.0], [2.0, 6.0, 7.0])
    assert three.pearson_r is not None
    assert three.r_ci95 is None


def test_sizes_that_are_all_alike() -> None:
    found = agreement([4.0, 4.0, 4.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    assert (found.pearson_r, found.p_value, found.r_ci95) == (None, None, None)
    same = agreement([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    assert (same.bias, same.limits, same.slope, same.slope_p_value) == (0, (0, 0), 0, 1)
    assert agreement([2.0] * 4, [2.0] * 4).slope is None


def test_sizes_that_cannot_be_compared() -> None:
    for predicted, true in (([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])):
        with pytest.raises(ValueError, match="equally long"):
            agreement(predicted, true)
    with pytest.raises(ValueError, match="finite"):
        agreement([1.0, math.inf], [1.0, 2.0])
