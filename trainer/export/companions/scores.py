"""What a card says of the evaluations: of the weights after training only, each with the checkpoint that it scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.errors import counted
from trainer.export.companions.facts import Facts
from trainer.export.companions.markdown import section, table, text
from trainer.report.answer import answer, few_volumes, limits, scored_unlike
from trainer.report.data import Evaluation
from trainer.report.groups import mean_sd, quartiles, scored_metrics, tolerance_note
from trainer.scores import CaseScore, grouped

_KINDS = {"all": "all", "dataset": "data set", "modality": "modality", "term": "target"}
_NAMES = {"dsc": "DSC", "iou": "IoU", "nsd": "NSD"}


def score_section(facts: Facts, record: Mapping[str, Any]) -> str:
    """A table of each evaluation after training."""
    found = facts.scored()
    if not found:
        return section("Evaluation", "Not recorded: the run was not evaluated after training.")
    parts = [text(answer(facts.run)) if facts.run.after else ""]
    for evaluation in found:
        parts += [f"### {text(evaluation.name)}", _scored(evaluation, record), scores_table(evaluation.scores)]
        parts.append(tolerance_note(evaluation.scores))
    return section("Evaluation", *parts)


def scores_table(scores: tuple[CaseScore, ...]) -> str:
    """Mean and spread of each metric: of all targets, by data set, by modality and by target."""
    metrics = scored_metrics(scores)
    columns = ["Group", "Of", "n", "Images", "Cases"]
    columns += [
        part for metric in metrics for part in (f"{_NAMES[metric]} mean ± SD", f"{_NAMES[metric]} median (quartiles)")
    ]
    rows = []
    for (kind, name), group in grouped(scores).items():
        if kind in _KINDS:
            figures = [part for metric in metrics for part in (mean_sd(group, metric), quartiles(group, metric))]
            images, cases = len({one.key for one in group}), len({one.volume for one in group})
            rows.append((name, _KINDS[kind], len(group), images, cases, *figures))
    return table(columns, rows)


def score_limits(facts: Facts, record: Mapping[str, Any]) -> list[str]:
    """What the figures do not show."""
    found = [*limits(facts.run), few_volumes(facts.run), scored_unlike(facts.run)]
    evaluations = facts.scored()
    if not evaluations:
        found.append("The run was not evaluated after training: how well these weights do is not known.")
    if evaluations and not any(one.external for one in evaluations):
        found.append("It was not scored on an external set: how it does elsewhere is not known.")
    for evaluation in evaluations:
        found.append(
            f"The evaluation {evaluation.name} {_mismatch(evaluation, record)}."
            if _mismatch(evaluation, record)
            else ""
        )
    return [line for line in found if line]


def _scored(evaluation: Evaluation, record: Mapping[str, Any]) -> str:
    """Which weights were scored, how, and whether they are those of the export."""
    own = evaluation.record
    name = Path(str(own["checkpoint"])).name if own.get("checkpoint") else None
    asked = ", ".join(f"{key} {value}" for key, value in (own.get("prompts") or {}).items() if value is not None)
    rows = [
        ("checkpoint", name),
        ("optimiser steps behind it", own.get("step")),
        ("which weights", own.get("weights")),
        ("the exported weights", "no: it " + _mismatch(evaluation, record) if _mismatch(evaluation, record) else "yes"),
        ("external set", evaluation.external),
        ("asked with", asked),
        ("precision", own.get("precision")),
        ("masks compared", f"{counted(len(evaluation.scores), 'target')} at native resolution"),
    ]
    return table(("", ""), rows)


def _mismatch(evaluation: Evaluation, record: Mapping[str, Any]) -> str:
    """How what was scored differs from what is exported; empty where it does not, as far as both are known."""
    exported = record.get("checkpoint") or {}
    step, weights = evaluation.record.get("step"), evaluation.record.get("weights")
    if step is None or exported.get("step") is None:
        return "does not say of which step its weights were"
    if step != exported["step"]:
        return f"scored the weights of step {step:,}, and these are of step {exported['step']:,}"
    if weights is not None and weights != exported.get("weights"):
        return f"scored the {weights} weights, and these are the {exported.get('weights')} ones"
    return ""
