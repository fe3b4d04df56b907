"""The table of an evaluation: ``per_case.csv``, a row for each object, model and first mask."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from data_shards.errors import UserError
from trainer.report.tables import read_rows
from trainer.scores import write_table

Place = tuple[str, str, str, int]
"""Which object: set, case, term and the target's position."""


@dataclass(frozen=True)
class Row:
    """One object's result.

    Attributes:
        model: Name of the model; ``copy`` for the baseline that repeats the first mask.
        initial: Who made the first mask: a model's name, ``truth``, or ``prompt`` where there was none between; empty
            for images, and ``text`` where words asked for it.
        set: Name of the set.
        kind: ``2d``, ``3d`` or ``video``.
        prompt: ``box``, ``point``, ``mask`` or ``text``: how this model was asked.
        dataset: Data set of the case.
        modality: Its modality.
        case: Key of the image or volume.
        term: Clinical term.
        target: Position of the target in its image; −1 for all of a term, in an image or a volume.
        shown: Number of the slice that the object was shown on, from 0; −1 for images.
        first: First slice that was asked for; −1 for images.
        slices: Number of slices that were asked for; 1 for images.
        dsc: Dice similarity coefficient, of volumes over all voxels.
        iou: Intersection over union, likewise.
        nsd: Normalised surface Dice, of volumes in three dimensions.
        hd95: 95 % Hausdorff distance, in the unit of the tolerance, infinite where one of the masks is empty; None for
            videos.
        dsc_unprompted: Dice over all slices but the one that was shown; None for images.
        tolerance: Largest distance that NSD forgives, with its unit.
        seconds: Share of the computing time, encoding included.
        made_by: Stands for model, data and settings, and behind the dash for versions: rows that others made are not
            reused.
        plane: Anatomical plane of the slices; empty for plain images.
        spacing: Millimetres between slices of a volume, between rows of an image; None where they are not known.
        noise: How much the prompt was moved, in percent of the box's sides; 0 for one that was not.
        size_true: True volume or area, in slices that were asked for, 0 of a term that is absent; None for videos, as
            are the next ones.
        size_predicted: Predicted volume or area.
        size_unit: ``ml`` or ``voxels`` of volumes, ``mm2`` or ``px`` of images.
        lesions: Number of true lesions, connected pieces; None where they were not counted, as are the next ones.
        lesions_found: How many of them were found; see `trainer.metrics.detection`.
        false_positives: Number of predicted pieces that belong to no lesion.
        lesion_dice: Sum of the lesions' Dice with what has found them.
    """

    model: str
    initial: str
    set: str
    kind: str
    prompt: str
    dataset: str
    modality: str
    case: str
    term: str
    target: int
    shown: int
    first: int
    slices: int
    dsc: float
    iou: float
    nsd: float
    hd95: float | None
    dsc_unprompted: float | None
    tolerance: str
    seconds: float
    made_by: str
    plane: str = ""
    spacing: float | None = None
    noise: float = 0.0
    size_true: float | None = None
    size_predicted: float | None = None
    size_unit: str = ""
    lesions: int | None = None
    lesions_found: int | None = None
    false_positives: int | None = None
    lesion_dice: float | None = None

    @property
    def place(self) -> Place:
        """Which object this is about."""
        return self.set, self.case, self.term, self.target

    @property
    def is_absent(self) -> bool:
        """Whether the term was asked for where it is not: there is nothing to overlap with."""
        return self.size_true == 0


COLUMNS = [column.name for column in fields(Row)]
_COUNTS = ("lesions", "lesions_found", "false_positives")
_MAYBE = ("hd95", "dsc_unprompted", "spacing", "size_true", "size_predicted", "lesion_dice")
_NOT_YET = {"plane": "", "noise": "0", "size_unit": ""} | dict.fromkeys((*_COUNTS, *_MAYBE), "")
"""Cells of columns that tables of earlier versions lack."""


def read(path: Path) -> list[Row]:
    """Read the table; a last row that was cut off is left out, and there may be no table yet.

    Raises:
        UserError: The table is damaged elsewhere.
    """
    return list(read_rows(path, _row, "table of an evaluation")) if path.is_file() else []


def _row(cells: dict[str, str]) -> Row:
    cells = {"iou": "nan", **_NOT_YET, **cells}  # tables of earlier versions have none: their rows do not count
    whole = {name: int(cells[name]) for name in ("target", "shown", "first", "slices")}
    numbers = {name: float(cells[name]) for name in ("dsc", "iou", "nsd", "seconds", "noise")}
    maybe = {name: float(cells[name]) if cells[name] else None for name in _MAYBE}
    counts = {name: int(cells[name]) if cells[name] else None for name in _COUNTS}
    text = {name: cells[name] for name in COLUMNS if name not in {*whole, *numbers, *maybe, *counts}}
    return Row(**text, **whole, **numbers, **maybe, **counts)  # type: ignore[arg-type]


class Table:
    """The table while it is made: rows are on disk as soon as they are added.

    Args:
        path: The file.
        kept: Rows of earlier evaluations that still count.

    Raises:
        UserError: It cannot be written.
    """

    def __init__(self, path: Path, kept: Sequence[Row]) -> None:
        self.path, self.rows = path, list(kept)
        try:
            write_table(path, COLUMNS, map(astuple, self.rows))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error}): choose another --out") from error

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows."""
        new = list(rows)
        with self.path.open("a", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerows(
                [f"{cell:.6f}" if isinstance(cell, float) else cell for cell in astuple(row)] for row in new
            )
        self.rows += new
