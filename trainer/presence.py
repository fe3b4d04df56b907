"""Whether terms are found where they are, and left alone where they are not: ``presence.csv`` and its rates."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import numpy as np

from data_shards.errors import UserError
from trainer.run import write_json
from trainer.scores import UNKNOWN, write_table

GROUPS = ("dataset", "modality")
"""What answers are grouped by."""


@dataclass(frozen=True)
class TermAnswer:
    """What a text-prompted model says to one term in one image; a row of ``presence.csv``.

    Attributes:
        key: Sample key.
        term: Clinical term that was asked for.
        modality: Modality of the image.
        dataset: Data set of the image.
        present: Whether the term is there; false for one that was looked for and is absent.
        confidence: Of the most confident answer, in [0, 1].
        area_px: Area of the mask that is answered, in native pixels; 0 where the confidence is below the threshold.
    """

    key: str
    term: str
    modality: str
    dataset: str
    present: bool
    confidence: float
    area_px: int


@dataclass(frozen=True)
class PresenceRates:
    """How often a group's terms were found, rightly and wrongly.

    Attributes:
        kind: What is grouped by: ``all``, or one of `GROUPS`.
        group: The group, such as ``CT``; ``all`` for all answers.
        present: Number of terms asked for where they are.
        absent: Number of terms asked for where they are not.
        found: Share of the present terms with a confidence of at least the threshold; None without any.
        false_positives: The same share of the absent terms.
        auroc: Probability that a present term's confidence is above an absent one's, ties counting half: the area
            under the receiver operating characteristic. None unless there are both.
    """

    kind: str
    group: str
    present: int
    absent: int
    found: float | None
    false_positives: float | None
    auroc: float | None


def presence_rates(answers: Sequence[TermAnswer], threshold: float) -> list[PresenceRates]:
    """Rates of all answers, then of each data set and each modality; of a kind that no answer names there are none.

    Args:
        answers: The answers.
        threshold: Confidence from which a term counts as found.
    """
    rates = [_rates("all", "all", answers, threshold)] if answers else []
    for kind in GROUPS:
        parts: dict[str, list[TermAnswer]] = {}
        for answer in answers:
            parts.setdefault(getattr(answer, kind) or UNKNOWN, []).append(answer)
        if set(parts) - {UNKNOWN}:
            rates += [_rates(kind, group, parts[group], threshold) for group in sorted(parts)]
    return rates


def _rates(kind: str, group: str, answers: Sequence[TermAnswer], threshold: float) -> PresenceRates:
    there, gone = (np.array([a.confidence for a in answers if a.present is side], np.float64) for side in (True, False))

    def share(confidences: np.ndarray) -> float | None:
        return float((confidences >= threshold).mean()) if confidences.size else None

    return PresenceRates(kind, group, len(there), len(gone), share(there), share(gone), auroc(there, gone))


def auroc(positive: np.ndarray, negative: np.ndarray) -> float | None:
    """Area under the receiver operating characteristic of scores (N,) and (M,); None if either is empty.

    It is the Mann-Whitney statistic: the share of pairs in which the positive is higher, ties counting half.
    """
    if not positive.size or not negative.size:
        return None
    ranked = np.sort(negative)
    below = np.searchsorted(ranked, positive, side="left")
    up_to = np.searchsorted(ranked, positive, side="right")
    return float((below + up_to).mean() / (2 * negative.size))


def logged_rates(stage: str, answers: Sequence[TermAnswer], threshold: float) -> dict[str, float]:
    """What is logged of an evaluation: ``val/found``, ``val/false_positives`` and ``val/presence_auroc`` that exist.

    Args:
        stage: ``val`` or ``test``.
        answers: Its answers.
        threshold: Confidence from which a term counts as found.
    """
    if not answers:
        return {}
    rates = _rates("all", "all", answers, threshold)
    values = {"found": rates.found, "false_positives": rates.false_positives, "presence_auroc": rates.auroc}
    return {f"{stage}/{name}": value for name, value in values.items() if value is not None}


def record_answers(folder: Path, answers: Sequence[TermAnswer], threshold: float) -> None:
    """Write ``presence.csv``, and ``presence.json`` with every group's rates; without answers, remove an earlier one's.

    Args:
        folder: Of the evaluation.
        answers: Its answers.
        threshold: Confidence from which a term counts as found.
    """
    table, summary = folder / "presence.csv", folder / "presence.json"
    if not answers:
        table.unlink(missing_ok=True)
        summary.unlink(missing_ok=True)
        return
    write_answers(table, answers)
    groups = []
    for rates in presence_rates(answers, threshold):
        values = asdict(rates).items()
        groups.append({name: round(value, 6) if isinstance(value, float) else value for name, value in values})
    write_json(summary, {"threshold": threshold, "groups": groups})


def write_answers(path: Path, answers: Sequence[TermAnswer]) -> None:
    """Write ``presence.csv``, whole or not at all; `present` is 1 or 0."""
    rows = ((int(cell) if isinstance(cell, bool) else cell for cell in astuple(answer)) for answer in answers)
    write_table(path, [column.name for column in fields(TermAnswer)], (tuple(row) for row in rows))


def read_answers(path: Path) -> tuple[TermAnswer, ...]:
    """Read ``presence.csv``.

    Raises:
        UserError: A column is missing, or a value is none.
    """
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            return tuple(_answer(row) for row in csv.DictReader(handle))
    except KeyError as error:
        raise UserError(f"{path}: the column {error} is missing; run the evaluation again") from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); run the evaluation again") from error


def _answer(row: dict[str, str]) -> TermAnswer:
    confidence = float(row["confidence"])
    if not math.isfinite(confidence) or row["present"] not in ("0", "1"):
        raise ValueError(f"{row['key']} has a confidence that is no finite number, or is neither present nor absent")
    return TermAnswer(
        key=row["key"],
        term=row["term"],
        modality=row["modality"],
        dataset=row["dataset"],
        present=row["present"] == "1",
        confidence=confidence,
        area_px=int(row["area_px"]),
    )
