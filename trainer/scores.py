"""Scores of single targets and of groups of them, and their tables: ``per_case.csv`` and ``summary.csv``."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from operator import attrgetter
from pathlib import Path

import numpy as np

from data_shards.errors import UserError
from trainer.run import naming

METRICS = ("dsc", "iou", "nsd")
"""Scores of a target, all between 0 and 1."""
KINDS = ("dataset", "modality", "term", "tolerance")
"""What targets are grouped by."""
UNKNOWN = "unknown"
"""The group of targets of which that is not known."""


@dataclass(frozen=True)
class CaseScore:
    """One target's result in an evaluation; a row of ``per_case.csv``.

    Attributes:
        key: Sample key.
        target: Target position in its sample.
        term: Clinical term.
        modality: Modality of the image.
        area_px: Area of the true mask in native pixels.
        dsc: Dice similarity coefficient at native resolution.
        iou: Intersection over union at native resolution.
        dataset: Data set of the image; empty in tables of earlier versions.
        nsd: Normalised surface Dice at native resolution; None in tables of earlier versions.
        tolerance: Largest distance that NSD forgives: ``2 mm`` where the image's spacing is known, ``2 px`` otherwise.
    """

    key: str
    target: int
    term: str
    modality: str
    area_px: int
    dsc: float
    iou: float
    dataset: str = ""
    nsd: float | None = None
    tolerance: str = ""

    @property
    def volume(self) -> str:
        """The volume that the sample was cut from; the sample itself if its key names no slice."""
        return volume_of(self.key)


def volume_of(key: str) -> str:
    """A key without its slice, such as ``a00058``; a key that names no slice stays as it is."""
    return re.sub(r"-[a-z]\d+$", "", key)


def write_scores(path: Path, scores: Sequence[CaseScore]) -> None:
    """Write the table, whole or not at all."""
    write_table(path, [column.name for column in fields(CaseScore)], (astuple(score) for score in scores))


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table, whole or not at all; fractions get six decimals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with naming(path), temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    temporary.replace(path)


def read_scores(path: Path) -> tuple[CaseScore, ...]:
    """Read the table; of two rows of one target the later counts.

    Raises:
        UserError: A column is missing, or a value is no number.
    """
    rows: dict[tuple[str, int], CaseScore] = {}
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            for row in csv.DictReader(handle):
                score = CaseScore(
                    key=row["key"],
                    target=int(row["target"]),
                    term=row["term"],
                    modality=row["modality"],
                    area_px=int(row["area_px"]),
                    dsc=float(row["dsc"]),
                    iou=float(row["iou"]),
                    dataset=row.get("dataset") or "",
                    nsd=float(row["nsd"]) if row.get("nsd") else None,
                    tolerance=row.get("tolerance") or "",
                )
                if not all(math.isfinite(value) for value in (score.dsc, score.iou, score.nsd or 0.0)):
                    raise ValueError(f"{score.key} has a score that is no finite number")
                rows[score.key, score.target] = score
    except KeyError as error:
        raise UserError(f"{path}: the column {error} is missing; run the evaluation again") from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); run the evaluation again") from error
    return tuple(rows.values())


def pair(before: Iterable[CaseScore], after: Iterable[CaseScore]) -> list[tuple[CaseScore, CaseScore]]:
    """Targets that both have scored, in the order of the second."""
    first = {(score.key, score.target): score for score in before}
    found = ((first.get((score.key, score.target)), score) for score in after)
    return [(one, other) for one, other in found if one is not None]


@dataclass(frozen=True)
class Spread:
    """How one metric is spread over one group of targets; a row of ``summary.csv``.

    Attributes:
        kind: What is grouped by: ``all``, or one of `KINDS`.
        group: The group, such as ``CT``; ``all`` for all targets.
        metric: One of `METRICS`.
        n: Number of targets.
        mean: Their mean.
        q1: Lower quartile; between two values it is interpolated, as are the others.
        median: Median.
        q3: Upper quartile.
    """

    kind: str
    group: str
    metric: str
    n: int
    mean: float
    q1: float
    median: float
    q3: float


def grouped(scores: Sequence[CaseScore]) -> dict[tuple[str, str], list[CaseScore]]:
    """Targets by (kind, group), all of them first; of a kind that no row names there are no groups."""
    groups: dict[tuple[str, str], list[CaseScore]] = {("all", "all"): list(scores)} if scores else {}
    for kind in KINDS:
        names = [getattr(score, kind) for score in scores]
        parts: dict[str, list[CaseScore]] = {}
        for name, score in zip(names, scores, strict=True):
            parts.setdefault(name or UNKNOWN, []).append(score)
        if any(names):
            groups |= {(kind, name): parts[name] for name in sorted(parts)}
    return groups


def spreads(scores: Sequence[CaseScore]) -> list[Spread]:
    """Mean and quartiles of every metric in every group; a target without a metric does not count for it."""
    found = []
    for (kind, group), rows in grouped(scores).items():
        for metric in METRICS:
            values = values_of(rows, metric)
            if values.size:
                q1, median, q3 = (float(value) for value in np.percentile(values, [25, 50, 75]))
                found.append(Spread(kind, group, metric, len(values), float(values.mean()), q1, median, q3))
    return found


def values_of(scores: Iterable[CaseScore], metric: str) -> np.ndarray:
    """One metric of those targets that have it: (N,) float64."""
    values = map(attrgetter(metric), scores)
    return np.array([value for value in values if value is not None], np.float64)


def write_spreads(path: Path, scores: Sequence[CaseScore]) -> None:
    """Write ``summary.csv`` of an evaluation, whole or not at all."""
    write_table(path, SPREAD_COLUMNS, (astuple(spread) for spread in spreads(scores)))


SPREAD_COLUMNS = tuple(column.name for column in fields(Spread))
"""Columns of ``summary.csv``."""
