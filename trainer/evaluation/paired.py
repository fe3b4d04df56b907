"""The statistics of a comparison: quartiles of one column, and two columns tested on the same objects.

Shapes: N objects, or volumes where those are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.evaluation.columns import Answer
from trainer.report.statistics import ci95_of, quartiles, signed_rank

DECIMALS = 9
"""Of differences: the tables have six, and 0.3 − 0.1 shall tie with 0.2 in the ranks."""


@dataclass(frozen=True)
class Cell:
    """One model's scores in one row.

    Attributes:
        mean: Of the N scores.
        q1: Lower quartile; between two scores it is interpolated, as are the others.
        median: Median.
        q3: Upper quartile.
        star: Significantly better than the reference.
        dagger: Significantly better than every other column.
    """

    mean: float
    q1: float
    median: float
    q3: float
    star: bool = False
    dagger: bool = False


@dataclass(frozen=True)
class Test:
    """Two columns compared on the same objects.

    Attributes:
        column: The one.
        against: The other; of a pair with the reference that is this.
        difference: Mean of (column − against); None where one of the scores is infinite.
        ci95: Its bootstrap 95 % confidence interval; None there, too, and with N < 2. See
            `trainer.report.statistics.MANY`.
        effect: Matched-pairs rank-biserial correlation (Kerby 2014), from −1 to 1: above 0 where `column` has the
            higher scores.
        p_value: Two-sided Wilcoxon signed-rank test; None with N < 2 or without any difference.
        p_holm: Adjusted for all tests of the table.
    """

    column: str
    against: str
    difference: float | None
    ci95: tuple[float, float] | None
    effect: float
    p_value: float | None
    p_holm: float | None = None


def values_of(answers: Sequence[Answer], metric: str, each: str) -> np.ndarray:
    """Scores (N,), of objects or the means of volumes."""
    if each == "object":
        return np.array([answer.scores[metric] for answer in answers], np.float64)
    volumes: dict[tuple[str, str], list[float]] = {}
    for answer in answers:
        volumes.setdefault(answer.volume, []).append(answer.scores[metric])
    return np.array([np.mean(volumes[volume]) for volume in sorted(volumes)], np.float64)


def spread(values: np.ndarray) -> Cell:
    """Mean and quartiles of scores (N,), which may be infinite."""
    q1, median, q3 = quartiles(values)
    return Cell(float(values.mean()), q1, median, q3)


def tested(column: str, against: str, values: Mapping[str, np.ndarray]) -> Test:
    """Compare two columns' scores (N,) of the same objects."""
    mine, theirs = values[column], values[against]
    gains = differences(mine, theirs)
    finite = bool(np.isfinite(mine).all() and np.isfinite(theirs).all())
    mean, bounds = (float(gains.mean()), interval(gains)) if finite else (None, None)
    return Test(column, against, mean, bounds, rank_biserial(gains), signed_rank(gains))


def interval(gains: np.ndarray) -> tuple[float, float] | None:
    """95 % confidence interval of the mean of differences (N,), None if N < 2; see `ci95_of`."""
    return ci95_of(gains, "mean")


def differences(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Differences of scores (N,), finite, with ties that rounding does not break.

    Two infinite scores are alike; of one alone the difference is larger than all others.
    """
    both = np.isinf(mine) & np.isinf(theirs)
    with np.errstate(invalid="ignore"):
        gains = np.where(both, 0.0, mine - theirs)
    infinite = np.isinf(gains)
    largest = np.abs(gains[~infinite]).max(initial=0.0) + 1.0
    return np.round(np.where(infinite, np.sign(gains) * largest, gains), DECIMALS)


def rank_biserial(gains: np.ndarray) -> float:
    """Share of the ranks of |gain| that rose less the share that fell, from −1 to 1; 0 without any difference.

    Args:
        gains: (N,) finite differences; those of 0 do not count, as in the signed-rank test.
    """
    from scipy.stats import rankdata

    changed = gains[gains != 0]
    if not changed.size:
        return 0.0
    ranks = rankdata(np.abs(changed))
    return float((ranks * np.sign(changed)).sum() / ranks.sum())
