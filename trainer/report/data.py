"""Everything that a report says, read from the run's folder. Whatever is absent is None or empty."""

from __future__ import annotations

import csv
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import UserError
from trainer.report.curves import Curve, read_curves
from trainer.report.panels import Panel, load_panels
from trainer.report.statistics import Comparison, compare
from trainer.run import Run, read_json
from trainer.scores import CaseScore, read_scores

BEFORE, AFTER = "untouched", "tuned"
"""Names of the evaluations that a report compares."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        name: Its folder's name.
        scores: Rows in the order of the file, every (key, target) once.
        panels: Some targets as pictures.
        record: ``evaluation.json``, or empty.
    """

    name: str
    scores: tuple[CaseScore, ...]
    panels: tuple[Panel, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunData:
    """What is known of a run.

    Attributes:
        name: The run's name.
        shown: The run's folder as a reader would write it in a command.
        question: What the recipe asks, without its caveat.
        caveat: What the answer does not show.
        record: ``run.json``, or empty.
        stages: Seconds by stage.
        recipe: The recipe's text.
        before: The evaluation before tuning.
        after: The evaluation after tuning.
        others: Evaluations under other names.
        curves: Logged values by column and step.
        exports: Every ``export.json``, with its ``format``.
        trained: Keys of the samples that were trained on; None if that was not recorded.
    """

    name: str
    shown: str
    question: str | None
    caveat: str | None
    record: dict[str, Any]
    stages: dict[str, float]
    recipe: str
    before: Evaluation | None
    after: Evaluation | None
    others: tuple[Evaluation, ...] = ()
    curves: dict[str, Curve] = field(default_factory=dict)
    exports: tuple[dict[str, Any], ...] = ()
    trained: frozenset[str] | None = None

    def pairs(self) -> list[tuple[CaseScore, CaseScore]]:
        """Targets with a score before and after, in the order of the second evaluation."""
        if self.before is None or self.after is None:
            return []
        first = {(score.key, score.target): score for score in self.before.scores}
        found = [(first.get((score.key, score.target)), score) for score in self.after.scores]
        return [(before, after) for before, after in found if before is not None]

    def scores(self) -> list[CaseScore]:
        """Rows that the report is about: those after tuning where there are any, paired where there are pairs."""
        pairs = self.pairs()
        if pairs:
            return [after for _, after in pairs]
        only = self.after or self.before
        return list(only.scores) if only else []

    def compare(self, score: str) -> Comparison | None:
        """Compare ``dsc`` or ``iou`` over the pairs; None without any."""
        pairs = self.pairs()
        if not pairs:
            return None
        before, after = (np.array([getattr(side, score) for side in sides]) for sides in zip(*pairs, strict=True))
        return compare(before, after)

    def images_per_second(self) -> float | None:
        """Median of what was logged, without the first, which includes the warm-up."""
        rates = list(self.curves.get("train/images_per_second", {}).values())[1:]
        return float(np.median(rates)) if rates else None

    def outdated(self) -> bool:
        """Whether the run was trained on after its evaluation."""
        scored = self.after.record.get("step") if self.after else None
        return isinstance(scored, int) and scored < max(self.curves.get("train/loss", {0: 0.0}))

    def splits(self) -> dict[str, dict[str, Any]]:
        """Every split that was trained on or scored: folder, hash of the index, samples."""
        found: dict[str, dict[str, Any]] = dict(self.record.get("data") or {})
        for evaluation in (self.before, self.after, *self.others):
            found |= (evaluation.record.get("data") or {}) if evaluation else {}
        return found

    def missing(self) -> dict[str, str]:
        """What the run lacks, and the command that makes it."""
        recipe = f"{self.shown}/recipe.yaml"
        tuned = "the evaluation after tuning" + (" (the one there is older than the training)" if self.after else "")
        wanted = {
            "the training curve": (self.curves.get("train/loss"), f"trainer fit -c {recipe}"),
            "the evaluation before tuning": (self.before, f"trainer test -c {recipe}"),
            tuned: (self.after and not self.outdated(), f"trainer test -c {recipe} --ckpt_path last"),
            "an export that another tool has loaded": (
                self.exports,
                f"trainer export {self.shown} --to FORMAT --out FILE",
            ),
        }
        return {what: command for what, (found, command) in wanted.items() if not found}


def read_run(run: Run) -> RunData:
    """Read a run's folder.

    Raises:
        UserError: A file is there, but damaged.
    """
    recipe = _text(run.recipe)
    record = read_json(run.record) if run.record.is_file() else {}
    asked, caveat = _opening(recipe)
    question, _, inline = str(record.get("question") or asked or "").partition("Caveat:")
    evaluations = {folder.name: _evaluation(folder) for folder in sorted(run.evaluation("").glob("*/"))}
    found = {name: evaluation for name, evaluation in evaluations.items() if evaluation is not None}
    return RunData(
        name=str(record.get("name") or run.root.resolve().name),
        shown=_shown(run.root),
        question=question.strip() or None,
        caveat=str(record.get("caveat") or inline or caveat or "").strip() or None,
        record=record,
        stages=_stages(run.stages),
        recipe=recipe,
        before=found.pop(BEFORE, None),
        after=found.pop(AFTER, None),
        others=tuple(found.values()),
        curves=read_curves(run.root / "logs"),
        exports=tuple(_export(path) for path in sorted(run.exports.glob("*/export.json"))),
        trained=_trained(run.trace),
    )


def _evaluation(folder: Path) -> Evaluation | None:
    table, panels = folder / "per_case.csv", folder / "panels.npz"
    scores = read_scores(table) if table.is_file() else ()
    if not scores:
        return None
    record = folder / "evaluation.json"
    pictures = tuple(load_panels(panels)) if panels.is_file() else ()
    return Evaluation(folder.name, scores, pictures, read_json(record) if record.is_file() else {})


def _export(path: Path) -> dict[str, Any]:
    return {"format": path.parent.name, "verified": None, **read_json(path)}


def _stages(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        return {name: float(seconds) for name, seconds in read_json(path).items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: expected seconds by stage ({error})") from error


def _trained(trace: Path) -> frozenset[str] | None:
    if not trace.is_file():
        return None
    with trace.open(newline="", encoding="utf-8") as handle:
        return frozenset(key for row in csv.DictReader(handle) for key in (row.get("keys") or "").split())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from error


def _opening(recipe: str) -> tuple[str, str]:
    """Question and caveat in a recipe's opening comment, up to its first empty line."""
    match = re.match(r"(?:#[^\n]*\n)+", recipe)
    question: list[str] = []
    caveat: list[str] = []
    for line in match.group().splitlines() if match else []:
        text = line.lstrip("# ").rstrip()
        if not text or text.startswith("Launch:"):
            break
        (caveat if caveat or text.startswith("Caveat:") else question).append(text.removeprefix("Caveat:").strip())
    return " ".join(question), " ".join(caveat)


def _shown(root: Path) -> str:
    """The folder relative to where the reader stands; its name alone if it is elsewhere: a report is sent round."""
    relative = os.path.relpath(root)
    return root.resolve().name if relative.startswith("..") else Path(relative).as_posix()
