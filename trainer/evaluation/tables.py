"""What the rows of an evaluation say: figures by modality, and differences on the same cases.

Shapes: N objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trainer.evaluation.protocol import COPY
from trainer.evaluation.rows import Place, Row
from trainer.report.statistics import Comparison, compare

METRICS = {"dsc": "DSC", "nsd": "NSD", "dsc_unprompted": "DSC, other slices"}
"""Scores that the tables show, and what they call them."""
ALL = "all"

Line = tuple[str, str]
"""A model and who made the first mask: a line of the tables."""


@dataclass(frozen=True)
class Section:
    """Sets that are asked in one way, on which every model answered the same objects.

    Attributes:
        kind: ``2d``, ``3d`` or ``video``.
        prompt: ``box``, ``point`` or ``mask``.
        sets: Names of the sets.
        rows: Of each line the rows of those objects that all lines have, in the same order.
        partial: Objects that some line lacks, which are left out.
    """

    kind: str
    prompt: str
    sets: tuple[str, ...]
    rows: dict[Line, list[Row]]
    partial: int

    @property
    def modalities(self) -> list[str]:
        """In alphabetical order."""
        return sorted({row.modality for rows in self.rows.values() for row in rows})

    @property
    def metrics(self) -> list[str]:
        """Scores that there are."""
        return [m for m in METRICS if any(getattr(r, m) is not None for rows in self.rows.values() for r in rows)]

    @property
    def tolerances(self) -> list[str]:
        """Distances that NSD forgives."""
        return sorted({row.tolerance for rows in self.rows.values() for row in rows})


def section_of(kind: str, prompt: str, sets: Sequence[str], lines: Sequence[Line], rows: Iterable[Row]) -> Section:
    """Bring together what every line has.

    Args:
        kind: Of the sets.
        prompt: Of the sets.
        sets: Names of the sets.
        lines: In the order of the table; those without a row are left out.
        rows: Of one kind; others may be among them.
    """
    found: dict[Line, dict[Place, Row]] = {line: {} for line in lines}
    for row in rows:
        if row.set in sets and row.kind == kind and (row.model, row.initial) in found:
            found[row.model, row.initial][row.place] = row
    present = {line: mine for line, mine in found.items() if mine}
    every = set().union(*present.values())
    common = sorted(every.intersection(*present.values())) if present else []
    chosen = {line: [mine[place] for place in common] for line, mine in present.items()}
    return Section(kind, prompt, tuple(sets), chosen, len(every) - len(common))


@dataclass(frozen=True)
class Figures:
    """How one score is spread: number, mean, median and quartiles."""

    n: int
    mean: float
    q1: float
    median: float
    q3: float


def figures(rows: Sequence[Row], metric: str, modality: str = ALL) -> Figures | None:
    """Figures of a score, of one modality or all; None where there is no row."""
    values = _values([row for row in rows if modality in (ALL, row.modality)], metric)
    if not len(values):
        return None
    low, median, high = (float(value) for value in np.percentile(values, [25, 50, 75]))
    return Figures(len(values), float(values.mean()), low, median, high)


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
        "objects": len(next(iter(section.rows.values()), [])),
        "objects_not_answered_by_all": section.partial,
        "lines": lines,
        "differences": compared,
    }


def _values(rows: Sequence[Row], metric: str) -> np.ndarray:
    values = (getattr(row, metric) for row in rows)
    return np.array([value for value in values if value is not None], np.float64)
