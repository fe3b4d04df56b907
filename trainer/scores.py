"""Scores of single targets, and the table that keeps them: ``per_case.csv`` of an evaluation."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from data_shards.errors import UserError


@dataclass(frozen=True)
class CaseScore:
    """One target's result in an evaluation; a row of ``per_case.csv``.

    Attributes:
        key: Sample key.
        target: Target position in its sample.
        term: Clinical term.
        modality: Modality of the image.
        area_px: Area of the true mask in native pixels.
        dsc: Dice similarity coefficient at native resolution.
        iou: Intersection over union at native resolution.
    """

    key: str
    target: int
    term: str
    modality: str
    area_px: int
    dsc: float
    iou: float

    @property
    def volume(self) -> str:
        """The volume that the sample was cut from; the sample itself if its key names no slice."""
        return volume_of(self.key)


def volume_of(key: str) -> str:
    """A key without its slice, such as ``a00058``; a key that names no slice stays as it is."""
    return re.sub(r"-[a-z]\d+$", "", key)


def write_scores(path: Path, scores: Sequence[CaseScore]) -> None:
    """Write the table, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow([column.name for column in fields(CaseScore)])
        for s in scores:
            writer.writerow([s.key, s.target, s.term, s.modality, s.area_px, f"{s.dsc:.6f}", f"{s.iou:.6f}"])
    temporary.replace(path)


def read_scores(path: Path) -> tuple[CaseScore, ...]:
    """Read the table; of two rows of one target the later counts.

    Raises:
        UserError: A column is missing, or a value is no number.
    """
    rows: dict[tuple[str, int], CaseScore] = {}
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            for row in csv.DictReader(handle):
                score = CaseScore(
                    key=row["key"],
                    target=int(row["target"]),
                    term=row["term"],
                    modality=row["modality"],
                    area_px=int(row["area_px"]),
                    dsc=float(row["dsc"]),
                    iou=float(row["iou"]),
                )
                if not (math.isfinite(score.dsc) and math.isfinite(score.iou)):
                    raise ValueError(f"{score.key} has a score that is no finite number")
                rows[score.key, score.target] = score
    except KeyError as error:
        raise UserError(f"{path}: the column {error} is missing; run the evaluation again") from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); run the evaluation again") from error
    return tuple(rows.values())
