"""Several runs beside each other: what they scored on the same targets, what they cost, and how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_shards.errors import UserError
from trainer.recipe import flat
from trainer.report.data import Evaluation, RunData, scored_differently
from trainer.report.statistics import Comparison, compare, holm
from trainer.scores import CaseScore

ABSENT = object()
"""Stands for a key that a recipe does not have: null is a value."""
_PLACES = ("default_root_dir", "dirpath", "save_dir")
"""Keys that say where a run is kept: they always differ."""
_SAME = 1e-6
"""Scores that are no further apart than this are the same: tables have six decimals."""

Target = tuple[str, int]


@dataclass(frozen=True)
class Runs:
    """Runs that are compared.

    Attributes:
        runs: By the label that tells them apart, the first one being what others are compared with; at least two.
        roots: Their folders, in the same order.
    """

    runs: dict[str, RunData]
    roots: tuple[Path, ...]

    @property
    def first(self) -> str:
        """Label of the run that others are compared with."""
        return next(iter(self.runs))

    @cached_property
    def scored(self) -> dict[str, dict[Target, CaseScore]]:
        """Targets after tuning of those runs that were evaluated then."""
        return {
            label: {(row.key, row.target): row for row in data.after.scores}
            for label, data in self.runs.items()
            if data.after
        }

    @cached_property
    def common(self) -> list[Target]:
        """Targets that every run has scored that was evaluated after tuning, in the order of the first."""
        tables = list(self.scored.values())
        return [target for target in tables[0] if all(target in table for table in tables)] if tables else []

    def rows(self, label: str) -> list[CaseScore]:
        """What a run scored after tuning: on the common targets, or on its own where there are none in common."""
        table = self.scored.get(label, {})
        return [table[target] for target in self.common] if self.common else list(table.values())

    @cached_property
    def untouched(self) -> list[CaseScore]:
        """Scores of the common targets before tuning where they are the same in all runs, else nothing."""
        sides = [_on(data.before, self.common) for data in self.runs.values() if data.before]
        if not sides or not self.common or any(len(side) < len(self.common) for side in sides):
            return []
        dsc = np.array([[row.dsc for row in side] for side in sides])
        return sides[0] if float(np.ptp(dsc, axis=0).max()) <= _SAME else []

    def differences(self, metric: str = "dsc") -> dict[str, tuple[Comparison, float | None]]:
        """Each run compared with the first on the common targets, and its p-value corrected by Holm over the runs."""
        if not self.common or self.first not in self.scored:
            return {}
        own = self.rows(self.first)
        found: dict[str, Comparison] = {}
        for label in self.scored:
            pairs = [(getattr(a, metric), getattr(b, metric)) for a, b in zip(own, self.rows(label), strict=True)]
            both = np.array([pair for pair in pairs if None not in pair], np.float64).reshape(-1, 2)
            if label != self.first and len(both):
                found[label] = compare(both[:, 0], both[:, 1])
        adjusted = holm([one.p_value for one in found.values()])
        return {label: (one, p) for (label, one), p in zip(found.items(), adjusted, strict=True)}

    def unlike(self) -> dict[str, list[str]]:
        """By run, how its evaluation after tuning was made otherwise than the first run's that has one."""
        records = {label: data.after.record for label, data in self.runs.items() if data.after}
        first = next(iter(records.values()), {})
        found = {label: scored_differently(first, record) for label, record in records.items()}
        return {label: said for label, said in found.items() if said}

    def recipe_differences(self) -> dict[str, list[Any]]:
        """Keys of the recipes that are not the same in all, with each run's value; `ABSENT` where there is none."""
        return _unequal([flat(_recipe(data, root)) for data, root in zip(self.runs.values(), self.roots, strict=True)])

    def record_differences(self) -> dict[str, list[Any]]:
        """What ``run.json`` says otherwise: hardware, versions, data, commit; `ABSENT` where it says nothing."""
        names = ("hardware", "world_size", "precision", "git_commit", "versions", "data")
        records = [{name: data.record[name] for name in names if name in data.record} for data in self.runs.values()]
        return {key: cells for key, cells in _unequal([flat(one) for one in records]).items() if ".folder" not in key}


def gather(runs: Sequence[tuple[Path, RunData]]) -> Runs:
    """Put runs beside each other.

    Args:
        runs: Folder and content of each, at least two.

    Raises:
        UserError: One is there twice.
    """
    roots = [root.resolve() for root, _ in runs]
    for number, root in enumerate(roots):
        if root in roots[:number]:
            raise UserError(f"{runs[number][0]} is there twice: give every run once")
    named = dict(zip(labels([data.name for _, data in runs], roots), (data for _, data in runs), strict=True))
    return Runs(named, tuple(roots))


def labels(names: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """Names that tell runs apart: their own, or as much of the ends of their paths as that takes."""
    found = list(names)
    for depth in range(1, max(len(root.parts) for root in roots) + 1):
        if len(set(found)) == len(found):
            break
        found = ["/".join(root.parts[-depth:]) for root in roots]
    return _without_shared_end(found) if found != list(names) else found


def _without_shared_end(paths: Sequence[str]) -> list[str]:
    """``full`` and ``lora`` for ``full/seed-0`` and ``lora/seed-0``."""
    parts = [path.split("/") for path in paths]
    shared = 0
    while all(len(one) > shared + 1 for one in parts) and len({one[-1 - shared] for one in parts}) == 1:
        shared += 1
    shorter = ["/".join(one[: len(one) - shared]) for one in parts]
    return shorter if len(set(shorter)) == len(paths) else list(paths)


def _on(evaluation: Evaluation, targets: Sequence[Target]) -> list[CaseScore]:
    table = {(row.key, row.target): row for row in evaluation.scores}
    return [table[target] for target in targets if target in table]


def _recipe(data: RunData, root: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(data.recipe)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{root / 'recipe.yaml'}: not readable as YAML ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise UserError(f"{root / 'recipe.yaml'}: a recipe has keys with values, and this has none")
    return content


def _unequal(contents: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Keys with their values where these are not the same in all."""
    keys = dict.fromkeys(key for content in contents for key in content)
    found = {key: [content.get(key, ABSENT) for content in contents] for key in keys}
    return {
        key: cells
        for key, cells in found.items()
        if any(cell is ABSENT or cell != cells[0] for cell in cells) and key.rpartition(".")[2] not in _PLACES
    }
