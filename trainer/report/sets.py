"""The table of all sets that were scored: the run's own, and external ones that it never trained on."""

from __future__ import annotations

from typing import Any

from trainer.report.data import Evaluation, RunData
from trainer.report.markup import UNKNOWN, paragraph, score, section, signed, table
from trainer.scores import CaseScore, grouped, pair, values_of

_METRICS = {"dsc": "DSC", "iou": "IoU"}


def sets_section(data: RunData) -> str:
    """A row for each data set of each set that was scored; nothing where none of them is external."""
    sets = data.sets()
    if not any(one.external for both in sets for one in both if one):
        return ""
    rows = [row for before, after in sets for row in _rows(before, after)]
    columns = ["Data set", "Where", "n"]
    for name in _METRICS.values():
        columns += [f"{name} untouched", f"{name} tuned", f"{name} gain"]
    note = (
        "Means over the targets that both evaluations scored. An external set is one that no training takes; the run's "
        "own test set is internal."
    )
    label = "Scores by data set, internal and external"
    return section("Internal and external", table(columns, rows, label=label, words=(0, 1)), paragraph(note, "note"))


def _rows(before: Evaluation | None, after: Evaluation | None) -> list[tuple[Any, ...]]:
    """A row for each data set of one set: of the targets that both scored, or of the one evaluation there is."""
    where = "external" if any(one.external for one in (before, after) if one) else "internal"
    pairs = pair(before.scores, after.scores) if before and after else []
    if pairs:
        sides: list[list[CaseScore]] = [[one for one, _ in pairs], [other for _, other in pairs]]
    else:
        sides = [list(one.scores) if one else [] for one in (before, after)]
    parts = [{name: rows for (kind, name), rows in grouped(side).items() if kind == "dataset"} for side in sides]
    names = sorted({*parts[0], *parts[1]}) or ["all"]
    found = []
    for name in names:
        groups = [part.get(name, side if name == "all" else []) for part, side in zip(parts, sides, strict=True)]
        row: list[Any] = [name, where, max(map(len, groups))]
        for metric in _METRICS:
            means = [float(values_of(group, metric).mean()) if group else None for group in groups]
            gain = None if None in means else signed(means[1] - means[0])  # type: ignore[operator]
            row += [*(UNKNOWN if mean is None else score(mean) for mean in means), gain]
        found.append(tuple(row))
    return found
