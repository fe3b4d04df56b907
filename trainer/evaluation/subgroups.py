"""Scores of some of the objects: by data set, term, plane, spacing, and by how large the target is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from trainer.evaluation.protocol import COPY, GROUPINGS
from trainer.evaluation.rows import Row
from trainer.evaluation.tables import METRICS, Section, figures, label
from trainer.evaluation.thirds import thirds
from trainer.evaluation.told import Told
from trainer.report.markup import UNKNOWN, score

SHOWN = ("dsc", "nsd")
"""Scores that subgroups have."""
CUTS = (1.0, 2.5, 5.0)
"""Millimetres between groups of spacing."""
NOT_KNOWN = "not known"

Groups = dict[str, list[int]]
"""A group's name → positions of its objects among a section's."""


def subgroup_tables(section: Section, by: Sequence[str] | None) -> list[Told]:
    """A table for each way of grouping.

    Args:
        section: What was evaluated.
        by: Keys of `GROUPINGS`; None takes size, and whatever else the objects differ in but modality, which the tables
            of the scores are by.
    """
    names = list(dict.fromkeys(by)) if by is not None else [name for name in GROUPINGS if name != "modality"]
    found = []
    for name in names:
        groups = groups_of(section.objects, name)
        if groups and (by is not None or (len(groups) > 1 and set(groups) != {NOT_KNOWN})):
            found.append(_table(section, name, groups))
    return found


def groups_of(rows: Sequence[Row], name: str) -> Groups:
    """Groups in their order: sizes and spacings rising, names by the alphabet.

    Args:
        rows: Of one model.
        name: A key of `GROUPINGS`.
    """
    if name == "size":
        return thirds([(row.size_true, row.size_unit) for row in rows])
    if name == "spacing":
        return _spacings(rows)
    found: Groups = {}
    for place, row in enumerate(rows):
        found.setdefault(getattr(row, name) or NOT_KNOWN, []).append(place)
    return dict(sorted(found.items()))


def _spacings(rows: Sequence[Row]) -> Groups:
    """Spacings between fixed cut points."""
    names = [f"up to {CUTS[0]:g} mm", *(f"{a:g} to {b:g} mm" for a, b in pairwise(CUTS))]
    names += [f"above {CUTS[-1]:g} mm", NOT_KNOWN]
    found: Groups = {name: [] for name in names}
    for place, row in enumerate(rows):
        number = len(names) - 1 if row.spacing is None else int(np.searchsorted(CUTS, row.spacing - 1e-9))
        found[names[number]].append(place)
    return {name: places for name, places in found.items() if places}


def _table(section: Section, name: str, groups: Groups) -> Told:
    lines = [line for line in section.rows if line[0] != COPY]
    metrics = [metric for metric in SHOWN if metric in section.metrics]
    columns = [GROUPINGS[name], "n", "score", *(label(line) for line in lines)]
    cells = []
    for group, places in groups.items():
        for metric in metrics:
            scores = [_cell([section.rows[line][place] for place in places], metric) for line in lines]
            cells.append([group, f"{len(places):,}", METRICS[metric], *scores])
    return Told(f"By {GROUPINGS[name]}", columns, cells, _note(section, name), (0, 2))


def _cell(rows: Sequence[Row], metric: str) -> str:
    found = figures(rows, metric)
    return UNKNOWN if found is None else f"{score(found.median)} ({score(found.q1)}–{score(found.q3)})"


def _note(section: Section, name: str) -> str:
    how = "Median (quartiles)."
    if name == "size":
        return f"{how} Terciles of the true size, within each unit: a third of the objects each."
    if name == "spacing":
        between = "rows of an image" if section.kind == "2d" else "slices"
        return f"{how} Distance between {between}, with cut points at {', '.join(f'{cut:g}' for cut in CUTS)} mm."
    return how
