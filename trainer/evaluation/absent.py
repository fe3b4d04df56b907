"""Terms that are not there: how often does a model that is asked by text answer in vain?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trainer.evaluation.rows import Row
from trainer.evaluation.tables import Line, Section, label
from trainer.evaluation.thirds import UNITS
from trainer.evaluation.told import Told, amount
from trainer.report.markup import UNKNOWN, score


@dataclass(frozen=True)
class Presence:
    """Whether a model answers terms that are there, and leaves alone those that are not.

    Attributes:
        line: Whose answers they are.
        present: Number of terms asked for where they are.
        found: How many of them got a mask.
        absent: Number of terms asked for where the annotators looked for them and found nothing.
        in_vain: How many of those got a mask.
        areas: For each unit, the median area of what was answered in vain.
    """

    line: Line
    present: int
    found: int
    absent: int
    in_vain: int
    areas: dict[str, float]


def presence_of(section: Section) -> list[Presence]:
    """One of each model that was asked for absent terms."""
    found = []
    for line, rows in section.absent.items():
        there, vain = section.rows.get(line, []), [row for row in rows if row.size_predicted]
        areas = {unit: _median([row for row in vain if row.size_unit == unit]) for unit in UNITS}
        known = {unit: area for unit, area in areas.items() if area is not None}
        right = sum(bool(row.size_predicted) for row in there)
        found.append(Presence(line, len(there), right, len(rows), len(vain), known))
    return found


def _median(rows: Sequence[Row]) -> float | None:
    return float(np.median([row.size_predicted for row in rows])) if rows else None


def absent_tables(section: Section) -> list[Told]:
    """The same in words; nothing where no absent term was asked for."""
    found = presence_of(section)
    if not found:
        return []
    columns = [
        "model",
        "terms there",
        "answered (95 % CI)",
        "terms absent",
        "answered in vain (95 % CI)",
        "area in vain",
    ]
    lines = []
    for one in found:
        areas = " or ".join(f"{amount(area)} {UNITS[unit]}" for unit, area in one.areas.items())
        shares = [_share(one.found, one.present), _share(one.in_vain, one.absent)]
        counts = [f"{one.present:,}", shares[0], f"{one.absent:,}", shares[1]]
        lines.append([label(one.line), *counts, areas or UNKNOWN])
    note = (
        "A term counts as absent where the annotators looked for it and found nothing. Any mask is an answer; the area "
        "is the median of those in vain. These terms have no part in the scores above."
    )
    return [Told("Absent terms: how often is there an answer in vain?", columns, lines, note)]


def _share(part: int, whole: int) -> str:
    """A share with its interval (Wilson 1927)."""
    from scipy.stats import binomtest

    if not whole:
        return UNKNOWN
    bounds = binomtest(part, whole).proportion_ci(method="wilson")
    return f"{score(part / whole)} ({score(float(bounds.low))}–{score(float(bounds.high))})"


def absent_summary(section: Section) -> list[dict[str, Any]]:
    """The same as JSON."""
    found = []
    for one in presence_of(section):
        content = asdict(one)
        model, initial = content.pop("line")
        found.append({"model": model, "initial": initial, **content})
    return found
