"""Whether predicted volumes, such as a patient's tumour burden, and areas agree with the true ones.

Shapes: N objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trainer.evaluation.protocol import COPY
from trainer.evaluation.tables import Line, Section, label
from trainer.evaluation.thirds import UNITS
from trainer.evaluation.told import Told, amount, between
from trainer.metrics.agreement import Agreement, agreement
from trainer.report.markup import UNKNOWN, p_value


@dataclass(frozen=True)
class Sizes:
    """The sizes of a term that one model found.

    Attributes:
        term: Clinical term.
        unit: A key of `UNITS`.
        line: Whose they are.
        names: (N,) cases.
        predicted: (N,) predicted sizes.
        true: (N,) true ones.
        found: How they agree.
    """

    term: str
    unit: str
    line: Line
    names: list[str]
    predicted: np.ndarray
    true: np.ndarray
    found: Agreement


def sizes_of(section: Section) -> list[Sizes]:
    """Sizes by term, the most frequent first, and model; repeated first masks have none of their own."""
    found = []
    groups = _groups(section)
    for unit, term in sorted(groups, key=lambda group: (-len(groups[group]), group)):
        for line, rows in section.rows.items():
            mine = [rows[place] for place in groups[unit, term]]
            pairs = [(row.size_predicted, row.size_true) for row in mine]
            if line[0] == COPY or not pairs or any(side is None for pair in pairs for side in pair):
                continue
            predicted, true = np.array(pairs, np.float64).T
            names = [row.case for row in mine]
            found.append(Sizes(term, unit, line, names, predicted, true, agreement(predicted, true)))
    return found


def _groups(section: Section) -> dict[tuple[str, str], list[int]]:
    """Units and terms that have sizes, each with the positions of its objects."""
    found: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(section.objects):
        if row.size_unit:
            found.setdefault((row.size_unit, row.term), []).append(place)
    return found


def size_tables(section: Section) -> list[Told]:
    """Agreement by term and model, a table for each unit."""
    found = sizes_of(section)
    return [
        _table(unit, [one for one in found if one.unit == unit])
        for unit in UNITS
        if any(one.unit == unit for one in found)
    ]


def _table(unit: str, found: Sequence[Sizes]) -> Told:
    what = "Volumes" if unit in ("ml", "voxels") else "Areas"
    columns = [
        "term", "model", "n", f"true, median ({UNITS[unit]})", "Pearson r (95 % CI)", "bias (95 % CI)",
        "limits of agreement", "proportional bias",
    ]  # fmt: skip
    lines = []
    for one in found:
        numbers = one.found
        bounds = (
            f" ({numbers.r_ci95[0]:.3f}\u00a0to\u00a0{numbers.r_ci95[1]:.3f})".replace("-", "−")
            if numbers.r_ci95
            else ""
        )
        r = UNKNOWN if numbers.pearson_r is None else f"{numbers.pearson_r:.3f}{bounds}, {p_value(numbers.p_value)}"
        bias = amount(numbers.bias) + (f" ({between(numbers.bias_ci95)})" if numbers.bias_ci95 else "")
        slope = UNKNOWN if numbers.slope is None else f"{numbers.slope:+.3f}, {p_value(numbers.slope_p_value)}"
        lines.append(
            [
                one.term,
                label(one.line),
                f"{len(one.true):,}",
                amount(float(np.median(one.true))),
                r.replace("-", "−"),
                bias,
                between(numbers.limits),
                slope.replace("-", "−"),
            ]
        )
    note = (
        f"Predicted against true {what.lower()} of each object, in {UNITS[unit]}. Bias is the mean of predicted less "
        "true; about 95 % of the differences lie within the limits of agreement (Bland and Altman 1986). Proportional "
        "bias is by how much the difference grows with each unit of size. A high correlation alone is no agreement."
    )
    return Told(
        f"{what} in {UNITS[unit]}: do predicted and true sizes agree?", columns, lines, note, (0, 1, 4, 5, 6, 7)
    )


def size_summary(section: Section) -> list[dict[str, Any]]:
    """The same as JSON."""
    return [
        {"term": one.term, "unit": one.unit, "model": one.line[0], "initial": one.line[1], **asdict(one.found)}
        for one in sizes_of(section)
    ]
