"""Box plots and tables of scores by data set, modality and term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.report.boxes import box_plot
from trainer.report.data import RunData
from trainer.report.markup import UNKNOWN, paragraph, score, section, signed, table
from trainer.scores import CaseScore, grouped, values_of

_TITLES = {"dataset": "By data set", "modality": "By modality", "term": "By term"}
_NAMES = {"dsc": "DSC", "iou": "IoU", "nsd": "NSD"}
_DRAWN = ("dsc", "nsd")
"""Metrics with a box plot: IoU says the same as DSC."""
MOST_GROUPS = 12
"""Groups in a box plot, the largest ones; the table has all."""

Pair = tuple[CaseScore | None, CaseScore]
"""A target before and after tuning; of a run with one evaluation, that one alone."""


def group_sections(data: RunData) -> list[str]:
    """Box plots and a table for every kind of group; of data sets and modalities only where there are several.

    Boxes are drawn by modality, as in the papers' figures, and of a single modality by data set and by term.
    """
    pairs: list[Pair] = [*data.pairs()] or [(None, row) for row in data.scores()]
    before = {(row.key, row.target): row for row, _ in pairs if row}
    parts: dict[str, dict[str, list[Pair]]] = {}
    for (kind, name), rows in grouped([after for _, after in pairs]).items():
        parts.setdefault(kind, {})[name] = [(before.get((row.key, row.target)), row) for row in rows]
    several = len(parts.get("modality", ())) > 1
    return [
        _section(data, title, parts[kind], pairs, drawn=several == (kind == "modality"))
        for kind, title in _TITLES.items()
        if len(parts.get(kind, ())) > (kind != "term")
    ]


def box_charts(groups: Mapping[str, Mapping[str, Sequence[CaseScore]]], what: str) -> str:
    """Box plots of DSC and, where there is any, NSD.

    Args:
        groups: Groups in order → series → targets.
        what: What is drawn, such as ``by modality``, for who does not see it.
    """
    shown = dict(list(groups.items())[:MOST_GROUPS])
    charts = []
    for metric in _DRAWN:
        values = {
            group: {who: values_of(rows, metric) for who, rows in series.items()} for group, series in shown.items()
        }
        if any(found.size for series in values.values() for found in series.values()):
            drawn = box_plot(values, name=_NAMES[metric], label=f"{_NAMES[metric]} {what}")
            charts.append(f"<figure>{drawn}</figure>")
    left = len(groups) - len(shown)
    more = f" The {MOST_GROUPS} largest groups are drawn; {left} more are in the table." if left else ""
    note = (
        "Boxes: quartiles and median; whiskers: the last target within 1.5 interquartile ranges; dots: targets beyond."
    )
    return f'<div class="charts boxes">{"".join(charts)}</div>\n{paragraph(note + more, "note")}' if charts else ""


def mean_sd(rows: Sequence[CaseScore], metric: str) -> str:
    """Mean ± standard deviation of a metric."""
    values = values_of(rows, metric)
    if not values.size:
        return UNKNOWN
    return score(float(values.mean())) + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def quartiles(rows: Sequence[CaseScore], metric: str) -> str:
    """Median of a metric, and its quartiles."""
    values = values_of(rows, metric)
    if not values.size:
        return UNKNOWN
    low, median, high = np.percentile(values, [25, 50, 75])
    return f"{median:.3f} ({low:.3f}–{high:.3f})"


def scored_metrics(rows: Sequence[CaseScore]) -> list[str]:
    """Names of the metrics that some target has."""
    return [metric for metric in _NAMES if values_of(rows, metric).size]


def tolerance_note(rows: Sequence[CaseScore]) -> str:
    """What NSD is, where there is any."""
    found = sorted({row.tolerance for row in rows if row.nsd is not None and row.tolerance})
    return f"NSD: share of both outlines that is within {' or '.join(found)} of the other." if found else ""


def _section(data: RunData, title: str, groups: dict[str, list[Pair]], pairs: list[Pair], *, drawn: bool) -> str:
    rows = [after for _, after in pairs]
    metrics = scored_metrics(rows)
    name = title.removeprefix("By ").capitalize()
    when = "after" if data.after else "before"
    columns = [name, "n", f"DSC {when}", "median (quartiles)", *(f"{_NAMES[metric]} {when}" for metric in metrics[1:])]
    if data.pairs():
        both = [f"{_NAMES[metric]} {side}" for metric in metrics[1:] for side in ("before", "after")]
        medians = ["median (quartiles) before", "median (quartiles) after"]
        columns = [name, "n", "DSC before", "DSC after", "Gain", *medians, *both]
    ordered = sorted(groups, key=lambda group: (-len(groups[group]), group))
    foot = _row("all", pairs, metrics) if len(groups) > 1 else ()
    lines = [_row(group, groups[group], metrics) for group in ordered]
    label = f"Scores {title.lower()}, mean ± standard deviation"
    note = f"DSC: mean ± standard deviation, and median with quartiles. {tolerance_note(rows)}".strip()
    boxes = box_charts({group: _series(data, groups[group]) for group in ordered}, title.lower()) if drawn else ""
    return section(title, boxes, table(columns, lines, label=label, foot=foot), paragraph(note, "note"))


def _series(data: RunData, pairs: Sequence[Pair]) -> dict[str, list[CaseScore]]:
    """Targets of a group by when they were scored."""
    before, after = [one for one, _ in pairs if one], [other for _, other in pairs]
    if before:
        return {"before tuning": before, "after tuning": after}
    return {"after tuning" if data.after else "before tuning": after}


def _row(group: str, pairs: Sequence[Pair], metrics: Sequence[str]) -> tuple[Any, ...]:
    sides = [[before for before, _ in pairs if before], [after for _, after in pairs]]
    if not sides[0]:
        sides = sides[1:]
    dsc = [values_of(rows, "dsc").mean() for rows in sides]
    gain = (signed(float(dsc[1] - dsc[0])),) if len(sides) > 1 else ()
    spreads = [quartiles(rows, "dsc") for rows in sides]
    rest = [mean_sd(rows, metric) for metric in metrics[1:] for rows in sides]
    return group, len(pairs), *(mean_sd(rows, "dsc") for rows in sides), *gain, *spreads, *rest
