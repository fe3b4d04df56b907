"""Statistics by hand, and against SciPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from trainer.report.statistics import RESAMPLES, _resampled_medians, bootstrap_ci95, holm


def test_holm_by_hand() -> None:
    """Four tests: 4 × 0.005, 3 × 0.01, 2 × 0.03, 1 × 0.04, and no value below the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.3, 0.02, 0.6]) == pytest.approx([0.6, 0.06, 0.6]), "2 × 0.3, 3 × 0.02, 0.6"
    assert holm([0.5, 0.6]) == [1.0, 1.0], "never above 1"
    assert holm([0.04]) == [0.04], "one test needs no correction"
    assert holm([]) == []
    assert holm([0.0, 1.0]) == [0.0, 1.0]
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06] * 3), "ties alike"


def test_holm_leaves_out_what_was_not_tested() -> None:
    assert holm([None, 0.01, None, 0.04]) == [None, pytest.approx(0.02), None, pytest.approx(0.04)]
    assert holm([None, None]) == [None, None]


def test_holm_refuses_what_is_no_p_value() -> None:
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="not between 0 and 1"):
            holm([0.5, wrong])


def test_holm_rejects_what_its_steps_reject() -> None:
    """The procedure as it was published: go on from the smallest while p ≤ α / (tests that are left)."""
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(300):
        p_values = list(rng.beta(0.3, 3, rng.integers(1, 9)))
        adjusted = holm(p_values)
        steps = zip(sorted(p_values), range(len(p_values), 0, -1), strict=True)
        kept = {value for value, left in itertools.takewhile(lambda step: step[0] <= 0.05 / step[1], steps)}
        assert [value <= 0.05 for value in adjusted] == [value in kept for value in p_values]
        bonferroni = [min(1.0, value * len(p_values)) for value in p_values]
        assert all(a <= value <= b for a, value, b in zip(p_values, adjusted, bonferroni, strict=True))
        rejected += len(kept)
    assert 100 < rejected < 1300


def test_holm_keeps_the_family_wise_error() -> None:
    """Where nothing is there, at most 5 % of the families claim something, dependent tests or not."""
    rng = np.random.default_rng(1)
    shared = rng.normal(size=(4000, 1))
    for correlation in (0.0, 0.8):
        z = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * rng.normal(size=(4000, 6))
        claims = np.mean([min(holm(list(row))) < 0.05 for row in 2 * stats.norm.sf(np.abs(z))])
        assert 0.01 < claims < 0.06


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("count", [5, 40, 41, 300])
def test_bootstrap_intervals_against_scipy(statistic: str, count: int) -> None:
    values = np.random.default_rng(count).beta(5, 1.5, count)
    low, high = bootstrap_ci95(values, statistic=statistic)
    of = {"mean": np.mean, "median": np.median}[statistic]
    expected = stats.bootstrap(
        (values,), of, n_resamples=RESAMPLES, method="percentile", vectorized=True, rng=np.random.default_rng(9)
    ).confidence_interval
    spread = float(values.std())
    assert low == pytest.approx(expected.low, abs=0.05 * spread)
    assert high == pytest.approx(expected.high, abs=0.05 * spread)
    assert low < of(values) < high


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [1.0, 2.0, 4.0, 8.0]])
def test_medians_of_resamples_are_distributed_as_those_of_all_resamples(values: list[float]) -> None:
    every = [np.median(drawn) for drawn in itertools.product(values, repeat=len(values))]
    found = _resampled_medians(np.array(values), np.random.default_rng(3))
    for median in {*every, *found}:
        assert np.mean(found == median) == pytest.approx(np.mean(every == median), abs=0.02), median


def test_a_bootstrap_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    covered = {"mean": 0, "median": 0}
    for _ in range(200):
        values = rng.normal(0.7, 0.1, 60)
        for statistic in covered:
            low, high = bootstrap_ci95(values, statistic=statistic)
            covered[statistic] += low < 0.7 < high
    assert all(180 <= count <= 198 for count in covered.values()), covered


def test_a_bootstrap_is_repeatable_and_needs_two_values() -> None:
    values = [0.1, 0.5, 0.9, 0.4]
    for statistic in ("mean", "median"):
        assert bootstrap_ci95(values, statistic=statistic) == bootstrap_ci95(np.array(values), 0, statistic)
        assert bootstrap_ci95([0.3], statistic=statistic) is None
        assert bootstrap_ci95([0.3, 0.3], statistic=statistic) == (0.3, 0.3)
    with pytest.raises(ValueError, match="mean or median"):
        bootstrap_ci95(values, statistic="mode")
