"""What the rows of an evaluation say: figures by modality, and differences on the same cases.

Shapes: N objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from trainer.evaluation.protocol import COPY, TEXT
from trainer.evaluation.rows import Place, Row
from trainer.report.statistics import Comparison, ci95_of, compare, quartiles

METRICS = {"dsc": "DSC", "nsd": "NSD", "hd95": "HD95", "dsc_unprompted": "DSC, other slices"}
"""Scores that the tables show, and what they call them."""
DISTANCES = ("hd95",)
"""Those that are infinite where one of the masks is empty, and so have no mean."""
ALL = "all"

Line = tuple[str, str]
"""A model and who made the first mask: a line of the tables."""


@dataclass(frozen=True)
class Section:
    """Sets that are asked in one way, on which every model answered the same objects.

    Attributes:
        kind: ``2d``, ``3d`` or ``video``.
        prompt: ``box``, ``point``, ``mask`` or ``text``; a model that takes words alone is asked by text in any case.
        sets: Names of the sets.
        rows: Of each line the rows of those objects that all lines have, in the same order.
        partial: Objects that some line lacks, which are left out.
        by_term: Whether all of a term in an image is one object.
        noisy: For each level of noise, 0 among them, of each line the rows of those objects that all of these have;
            empty where none was asked for.
        absent: Rows of terms that are not there, of each line that was asked for some.
    """

    kind: str
    prompt: str
    sets: tuple[str, ...]
    rows: dict[Line, list[Row]]
    partial: int
    by_term: bool = False
    noisy: dict[float, dict[Line, list[Row]]] = field(default_factory=dict)
    absent: dict[Line, list[Row]] = field(default_factory=dict)

    @property
    def objects(self) -> list[Row]:
        """A row of each object, whatever it says of the answers."""
        return next(iter(self.rows.values()), [])

    @cached_property
    def modalities(self) -> list[str]:
        """In alphabetical order."""
        return sorted({row.modality for rows in self.rows.values() for row in rows})

    @cached_property
    def metrics(self) -> list[str]:
        """Scores that there are."""
        return [m for m in METRICS if any(getattr(r, m) is not None for rows in self.rows.values() for r in rows)]

    @property
    def tolerances(self) -> list[str]:
        """Distances that NSD forgives."""
        return sorted({row.tolerance for rows in self.rows.values() for row in rows})


def section_of(
    kind: str, prompt: str, sets: Sequence[str], lines: Sequence[Line], rows: Iterable[Row], by_term: bool = False
) -> Section:
    """Bring together what every line has.

    Args:
        kind: Of the sets.
        prompt: Of the sets.
        sets: Names of the sets.
        lines: In the order of the table; those without a row are left out.
        rows: Of one kind; others may be among them, such as those with noise.
        by_term: Whether all of a term in an image is one object.
    """
    found: dict[float, dict[Line, dict[Place, Row]]] = {0.0: {line: {} for line in lines}}
    absent: dict[Line, list[Row]] = {}
    for row in rows:
        line = (row.model, row.initial)
        if row.set not in sets or row.kind != kind or line not in found[0.0]:
            continue
        if row.is_absent:
            absent.setdefault(line, []).append(row)
        else:
            found.setdefault(row.noise, {}).setdefault(line, {})[row.place] = row
    present = {line: mine for line, mine in found[0.0].items() if mine}
    chosen, every = _common(present)
    left_out = every - len(next(iter(chosen.values()), []))
    return Section(kind, prompt, tuple(sets), chosen, left_out, by_term, _noisy(found), absent)


def _common(found: Mapping[Any, Mapping[Place, Row]]) -> tuple[dict[Any, list[Row]], int]:
    """Of each line the rows of what all lines have, in the same order, and how many objects some have."""
    every = set().union(*found.values())
    common = sorted(every.intersection(*found.values())) if found else []
    return {line: [mine[place] for place in common] for line, mine in found.items()}, len(every)


def _noisy(found: Mapping[float, Mapping[Line, Mapping[Place, Row]]]) -> dict[float, dict[Line, list[Row]]]:
    """Rows at every level of the lines that were asked at all of them, on the same objects."""
    levels = sorted(found)
    lines = [line for line in found[0.0] if all(found[level].get(line) for level in levels)]
    if len(levels) < 2 or not lines:
        return {}
    rows, _ = _common({(level, line): found[level][line] for level in levels for line in lines})
    return {level: {line: rows[level, line] for line in lines} for level in levels}


@dataclass(frozen=True)
class Figures:
    """How one score is spread.

    Attributes:
        n: Number of scores.
        mean: Their mean; None of distances.
        q1: Lower quartile.
        median: Median.
        q3: Upper quartile.
        infinite: How many are infinite; quartiles count them as larger than all others.
    """

    n: int
    mean: float | None
    q1: float
    median: float
    q3: float
    infinite: int = 0


def figures(rows: Sequence[Row], metric: str, modality: str = ALL) -> Figures | None:
    """Figures of a score, of one modality or all; None where there is no row."""
    values = _values([row for row in rows if modality in (ALL, row.modality)], metric)
    if not len(values):
        return None
    infinite = int(np.isinf(values).sum())
    low, median, high = quartiles(values)
    return Figures(len(values), None if metric in DISTANCES else float(values.mean()), low, median, high, infinite)


def intervals(rows: Sequence[Row], metric: str) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """95 % confidence intervals of mean and median, of distances of the median alone; see `ci95_of`."""
    values = _values(rows, metric)
    mean = None if metric in DISTANCES else ci95_of(values, "mean")
    return mean, ci95_of(values, "median")


@dataclass(frozen=True)
class Difference:
    """A line compared with another one on the same objects."""

    line: Line
    against: Line
    metric: str
    found: Comparison


def differences(section: Section) -> list[Difference]:
    """Every model's line against the first, and each that was followed against the repetition of its first mask."""
    lines, found = list(section.rows), []
    models = [line for line in lines if line[0] != COPY]
    for metric in section.metrics:
        if metric in DISTANCES:  # infinite ones have no difference: `trainer compare --metric hd95` compares ranks
            continue
        pairs = [(line, models[0]) for line in models[1:]]
        pairs += [(line, copy) for line in models if (copy := copy_of(line)) in section.rows]
        for line, against in pairs:
            before, after = (_values(section.rows[one], metric) for one in (against, line))
            if len(before) and len(before) == len(after):
                found.append(Difference(line, against, metric, compare(before, after)))
    return found


def copy_of(line: Line) -> Line:
    """The baseline that repeats the first mask of a line."""
    model, initial = line
    return COPY, f"prompt to {model}" if initial == "prompt" else initial


def label(line: Line) -> str:
    """A line in words."""
    model, initial = line
    if model == COPY:
        return f"first mask repeated ({initial})"
    if initial in ("", model):
        return model
    if initial == TEXT:
        return f"{model}, by text"
    return f"{model}, prompted directly" if initial == "prompt" else f"{model}, from {_whose(initial)}"


def _whose(initial: str) -> str:
    return "the true mask" if initial == "truth" else f"{initial}'s mask"


def summary(sections: Sequence[Section], left_out: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Everything that the tables show, as JSON.

    Args:
        sections: What was evaluated.
        left_out: Objects that could not be followed, as (set, case, term).
    """
    return {
        "sections": [_section(section) for section in sections],
        "left_out": [{"set": name, "case": case, "term": term} for name, case, term in left_out],
    }


def _section(section: Section) -> dict[str, Any]:
    lines = []
    for line, rows in section.rows.items():
        scores = {
            modality: {m: asdict(f) for m in section.metrics if (f := figures(rows, m, modality)) is not None}
            for modality in (ALL, *section.modalities)
        }
        for metric, found in scores[ALL].items():
            found["mean_ci95"], found["median_ci95"] = intervals(rows, metric)
        seconds = float(np.mean([row.seconds for row in rows])) if rows and line[0] != COPY else None
        lines.append({"model": line[0], "initial": line[1], "seconds": seconds, "scores": scores})
    compared = [
        {"model": one.line[0], "initial": one.line[1], "against": list(one.against), "metric": one.metric}
        | asdict(one.found)
        for one in differences(section)
    ]
    return {
        "kind": section.kind,
        "prompt": section.prompt,
        "sets": list(section.sets),
        "tolerances": section.tolerances,
        "objects": len(section.objects),
        "objects_not_answered_by_all": section.partial,
        "lines": lines,
        "differences": compared,
    }


def _values(rows: Sequence[Row], metric: str) -> np.ndarray:
    values = (getattr(row, metric) for row in rows)
    return np.array([value for value in values if value is not None], np.float64)
