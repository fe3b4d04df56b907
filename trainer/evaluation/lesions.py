"""Which lesions were found, out of what ``per_case.csv`` counts: true ones, found ones and false pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.evaluation.protocol import COPY
from trainer.evaluation.rows import Row
from trainer.evaluation.tables import ALL, Line, Section, label
from trainer.evaluation.told import Told
from trainer.metrics.detection import OVERLAP
from trainer.report.markup import UNKNOWN, score


@dataclass(frozen=True)
class Lesions:
    """How a model detects lesions.

    Attributes:
        term: Clinical term, or `ALL`.
        line: Whose answers they are.
        cases: Number of images or volumes.
        lesions: Number of true lesions.
        found: How many of them were found.
        false_positives: Number of predicted pieces that belong to none.
        sensitivity: Share of the lesions that were found; None without any.
        sensitivity_ci95: Its 95 % confidence interval (Wilson 1927).
        precision: Share of the predicted pieces that belong to a lesion; None without any.
        f1: Harmonic mean of both; None where there is nothing at all.
        false_per_case: False pieces in an image or volume, on average.
        lesion_wise_dice: Mean Dice of all lesions and false pieces, what was missed and what is false counting as 0.
    """

    term: str
    line: Line
    cases: int
    lesions: int
    found: int
    false_positives: int
    sensitivity: float | None
    sensitivity_ci95: tuple[float, float] | None
    precision: float | None
    f1: float | None
    false_per_case: float
    lesion_wise_dice: float | None


def lesions_of(section: Section) -> list[Lesions]:
    """Detection by term and model, and of all terms together if there are several; only where lesions are counted."""
    terms: dict[str, list[int]] = {}
    for place, row in enumerate(section.objects):
        if row.lesions is not None:
            terms.setdefault(row.term, []).append(place)
    if len(terms) > 1:
        terms = dict(sorted(terms.items())) | {ALL: [place for places in terms.values() for place in places]}
    return [
        _pooled(term, line, [rows[place] for place in places])
        for term, places in terms.items()
        for line, rows in section.rows.items()
        if line[0] != COPY
    ]


def _pooled(term: str, line: Line, rows: Sequence[Row]) -> Lesions:
    from scipy.stats import binomtest

    lesions, found, false = (
        sum(getattr(r, name) or 0 for r in rows) for name in ("lesions", "lesions_found", "false_positives")
    )
    cases = len({(row.set, row.case) for row in rows})
    bounds = binomtest(found, lesions).proportion_ci(method="wilson") if lesions else None
    dice = sum(row.lesion_dice or 0.0 for row in rows)
    return Lesions(
        term=term,
        line=line,
        cases=cases,
        lesions=lesions,
        found=found,
        false_positives=false,
        sensitivity=_share(found, lesions),
        sensitivity_ci95=(float(bounds.low), float(bounds.high)) if bounds else None,
        precision=_share(found, found + false),
        f1=_share(2 * found, found + false + lesions),
        false_per_case=false / cases,
        lesion_wise_dice=_share(dice, lesions + false),
    )


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def lesion_tables(section: Section) -> list[Told]:
    """Detection in words; nothing where lesions are not counted."""
    found = lesions_of(section)
    if not found:
        return []
    case = "volume" if section.kind == "3d" else "image"
    columns = [
        "term", "model", f"{case}s", "lesions found", "false", "sensitivity (95 % CI)", "precision", "F1",
        f"false per {case}", "lesion-wise DSC",
    ]  # fmt: skip
    lines = []
    for one in found:
        counts = [f"{one.cases:,}", f"{one.found:,} of {one.lesions:,}", f"{one.false_positives:,}"]
        bounds = one.sensitivity_ci95
        sure = f" ({score(bounds[0])}–{score(bounds[1])})" if bounds else ""
        shares = [score(one.sensitivity) + sure, score(one.precision), score(one.f1)]
        more = [f"{one.false_per_case:,.2f}", UNKNOWN if one.lesion_wise_dice is None else score(one.lesion_wise_dice)]
        lines.append([one.term, label(one.line), *counts, *shares, *more])
    note = (
        "A lesion is a connected piece of the truth (corners connect); it is found if a predicted piece of its own has "
        f"an IoU of at least {OVERLAP:g} with it, one piece for one lesion. Lesion-wise DSC is the mean over lesions "
        "and false pieces, with 0 for what was missed or is false. A box or point shows where to look, and only "
        "objects that are there are asked for: false pieces are those beside them in the same image or volume."
    )
    return [Told("Lesions: which were found?", columns, lines, note, (0, 1))]


def lesion_summary(section: Section) -> list[dict[str, Any]]:
    """The same as JSON."""
    found = []
    for one in lesions_of(section):
        content = asdict(one)
        model, initial = content.pop("line")
        found.append({"model": model, "initial": initial, **content})
    return found
