"""Everything that a report says, read from the run's folder. Whatever is absent is None or empty."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import UserError
from data_shards.splits import EXTERNAL
from trainer.report import curves
from trainer.report.curves import Curve, read_curves
from trainer.report.panels import Panel, load_panels
from trainer.report.records import (
    BoxesGiven,
    Jitter,
    Presence,
    Synonyms,
    read_boxes_given,
    read_export,
    read_jitter,
    read_presence,
    read_record,
    read_stages,
    read_synonyms,
)
from trainer.report.reliability import Calibration, read_calibration
from trainer.report.statistics import Comparison, compare
from trainer.report.traces import read_skipped, read_traces
from trainer.run import Run, opening
from trainer.scores import CaseScore, pair, read_scores

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
        jitter: Scores with boxes that are off, if they were probed.
        presence: How often terms were found, rightly and wrongly, if they were asked for in words.
        synonyms: Scores in other words, if they were probed.
        boxes_given: Scores by text and by box, if they were probed.
        calibration: Whether its probabilities come true, if that was recorded.
    """

    name: str
    scores: tuple[CaseScore, ...]
    panels: tuple[Panel, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)
    jitter: Jitter | None = None
    presence: Presence | None = None
    synonyms: Synonyms | None = None
    boxes_given: BoxesGiven | None = None
    calibration: Calibration | None = None

    @property
    def external(self) -> bool:
        """Whether it was scored on a set that is never trained on: its folder, or else its own name, says so."""
        test = (self.record.get("data") or {}).get("test") or {}
        names = (Path(str(test.get("folder"))).name, self.name.partition("-")[2])
        return any(name.startswith(EXTERNAL) for name in names)


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
        steps: Optimiser steps that were trained; None if not a single one was recorded.
        skipped: Keys of the samples that could not be read in training, and were left out.
        checkpoint_bytes: Size of the newest checkpoint; None without one.
        checkpoints: Bytes of all checkpoints that are kept; None without any.
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
    steps: int | None = None
    skipped: frozenset[str] = frozenset()
    checkpoint_bytes: int | None = None
    checkpoints: int | None = None

    def pairs(self) -> list[tuple[CaseScore, CaseScore]]:
        """Targets with a score before and after, in the order of the second evaluation."""
        return self._pairs

    @cached_property
    def _pairs(self) -> list[tuple[CaseScore, CaseScore]]:
        """Found once: a page asks twenty times, and there may be tens of thousands of targets."""
        if self.before is None or self.after is None:
            return []
        return pair(self.before.scores, self.after.scores)

    def sets(self) -> list[tuple[Evaluation | None, Evaluation | None]]:
        """Evaluations before and after tuning of each set that was scored, the run's own first.

        Those of another set are named alike: ``untouched-external-busi`` and ``tuned-external-busi``.
        """
        named = {evaluation.name: evaluation for evaluation in self.others}
        found = [(self.before, self.after)]
        for name in dict.fromkeys(
            name.partition("-")[2] for name in named if name.startswith((f"{BEFORE}-", f"{AFTER}-"))
        ):
            found.append((named.get(f"{BEFORE}-{name}"), named.get(f"{AFTER}-{name}")))
        return [pair for pair in found if any(pair)]

    def scores(self) -> list[CaseScore]:
        """Rows that the report is about: those after tuning where there are any, paired where there are pairs."""
        pairs = self.pairs()
        if pairs:
            return [after for _, after in pairs]
        only = self.after or self.before
        return list(only.scores) if only else []

    def compare(self, score: str) -> Comparison | None:
        """Compare ``dsc``, ``iou`` or ``nsd`` over the pairs that have it; None without any."""
        if score not in self._compared:
            self._compared[score] = self._compare(score)
        return self._compared[score]

    @cached_property
    def _compared(self) -> dict[str, Comparison | None]:
        """What was compared so far."""
        return {}

    def _compare(self, score: str) -> Comparison | None:
        values = [(getattr(before, score), getattr(after, score)) for before, after in self.pairs()]
        both = np.array([value for value in values if None not in value], np.float64).reshape(-1, 2)
        return compare(both[:, 0], both[:, 1]) if len(both) else None

    def images_per_second(self) -> float | None:
        """Median of what was logged, without the first, which includes the warm-up."""
        return curves.images_per_second(self.curves)

    def peak_memory_gib(self) -> float | None:
        """Most memory of the training: of tensors on a GPU, or else of the whole process; see `on_gpu`."""
        return curves.peak_memory_gib(self.curves)

    def on_gpu(self) -> bool:
        """Whether it was trained on GPUs, as far as was recorded."""
        hardware = str(self.record.get("hardware") or "")
        return curves.on_gpu(self.curves) or bool(re.match(r"\d+ × ", hardware))

    def device_hours(self) -> float | None:
        """Devices × hours of the training with its validations, over all attempts; None where one is not known."""
        devices, seconds = self.record.get("world_size"), self.stages.get("fit")
        return devices * seconds / 3600 if isinstance(devices, int) and seconds is not None else None

    def outdated(self) -> bool:
        """Whether the run was trained on after its evaluation; the best checkpoint may well be an early one."""
        record = self.after.record if self.after else {}
        scored, best = record.get("step"), Path(str(record.get("checkpoint"))).name.startswith("best-")
        return isinstance(scored, int) and scored < (self.steps or 0) and not best

    def unlike(self) -> list[str]:
        """How the evaluations that are compared were scored differently; what either did not record is left out."""
        if self.before is None or self.after is None or not self.pairs():
            return []
        return scored_differently(self.before.record, self.after.record)

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
    record = read_record(run.record)
    asked, caveat = opening(recipe)
    question, _, inline = str(record.get("question") or asked or "").partition("Caveat:")
    evaluations = {folder.name: _evaluation(folder) for folder in sorted(run.evaluation("").glob("*/"))}
    found = {name: evaluation for name, evaluation in evaluations.items() if evaluation is not None}
    curves, traced = read_curves(run.root / "logs"), read_traces(run.root)
    logged = max(curves.get("train/loss", {}), default=-1) + 1  # steps are counted from 0
    return RunData(
        name=str(record.get("name") or run.root.resolve().name),
        shown=_shown(run.root),
        question=question.strip() or None,
        caveat=str(record.get("caveat") or inline or caveat or "").strip() or None,
        record=record,
        stages=read_stages(run.stages),
        recipe=recipe,
        before=found.pop(BEFORE, None),
        after=found.pop(AFTER, None),
        others=tuple(found.values()),
        curves=curves,
        exports=tuple(read_export(path) for path in sorted(run.exports.glob("*/export.json"))),
        trained=traced[0] if traced else None,
        steps=(traced[1] if traced else 0) or logged or None,
        skipped=read_skipped(run.root),
        checkpoint_bytes=bytes_of(run.newest_checkpoint()),
        checkpoints=bytes_of(run.checkpoints) or None,
    )


def bytes_of(path: Path | None) -> int | None:
    """Bytes of a file, or of all files in a folder; None where it is not there. What a link leads to counts once."""
    if path is None or not path.exists():
        return None
    path = path.resolve()
    found = {one.resolve() for one in path.rglob("*") if one.is_file()} if path.is_dir() else {path}
    return sum(one.stat().st_size for one in found)


def _evaluation(folder: Path) -> Evaluation | None:
    table, panels = folder / "per_case.csv", folder / "panels.npz"
    scores = read_scores(table) if table.is_file() else ()
    if not scores:
        return None
    pictures = tuple(load_panels(panels)) if panels.is_file() else ()
    return Evaluation(
        name=folder.name,
        scores=scores,
        panels=pictures,
        record=read_record(folder / "evaluation.json"),
        jitter=read_jitter(folder / "jitter.json"),
        presence=read_presence(folder / "presence.json"),
        synonyms=read_synonyms(folder / "synonyms.json"),
        boxes_given=read_boxes_given(folder / "boxes_given.json"),
        calibration=read_calibration(folder / "calibration.json"),
    )


def scored_differently(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """How two evaluations were made differently, from their records; what either does not say is left out."""
    found: list[str] = []
    for split, of in (first.get("data") or {}).items():
        hashes = [(side or {}).get("index_sha256") for side in (of, (second.get("data") or {}).get(split))]
        if None not in hashes and hashes[0] != hashes[1]:
            found.append(f"{split} data (index {str(hashes[0])[:8]}…, then {str(hashes[1])[:8]}…)")
    for name in ("preprocessing", "prompts", "precision"):
        if first.get(name) is not None and second.get(name) is not None:
            found += _differences(name, first[name], second[name])
    return found


def _differences(name: str, first: Any, second: Any) -> list[str]:
    """A value before and after where they differ; of objects every member that does."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return [] if first == second else [f"{name} ({first}, then {second})"]
    return [
        f"{name} {member} ({first.get(member, 'none')}, then {second.get(member, 'none')})"
        for member in {**first, **second}
        if first.get(member) != second.get(member)
    ]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from error


def _shown(root: Path) -> str:
    """The folder relative to where the reader stands; its name alone if it is elsewhere: a report is sent round."""
    relative = os.path.relpath(root)
    return root.resolve().name if relative.startswith("..") else Path(relative).as_posix()
