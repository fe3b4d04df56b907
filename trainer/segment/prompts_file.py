"""``prompts.csv``: on which slice of which image which object is shown."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_shards.errors import UserError, nearest
from trainer.segment.asking import MIDDLE, Said, grouped, parse_slice
from trainer.segment.images import Item
from trainer.volumes.asked import Asked

BOX, POINT = ("x0", "y0", "x1", "y1"), ("x", "y")
COLUMNS = ("image", "slice", *BOX, *POINT, "label", "name", "first", "last")
DESCRIPTION = """\
prompts.csv has a line for each box or point, under a head line that names its columns:

  image             its path in the folder, or its name without folder and suffix
  slice             where it is shown, from 0 (empty: the middle of those wanted)
  x0, y0, x1, y1    a box in pixels of that slice, the outermost ones included
  x, y, label       a point: the label is 1 or + on the object (also if empty), 0 or - beside it
  name              of the object: lines of one image and name are one object
  first, last       the slices of the image that are wanted, the same in all its lines (empty: all)

Columns that are not needed may be left out. Images without a line are left alone, and named.
"""


@dataclass(frozen=True)
class Line:
    """A line of the file; `slice` is None for the middle one."""

    number: int
    name: str | None
    slice: int | None
    box: tuple[float, float, float, float] | None
    point: tuple[float, float, int] | None


@dataclass(frozen=True)
class ImagePrompts:
    """What one image is asked.

    Attributes:
        where: The file, for messages.
        lines: Its lines, at least one.
        first: First slice that is wanted, or None.
        last: Last one, or None.
    """

    where: str
    lines: tuple[Line, ...]
    first: int | None
    last: int | None

    def asked(self, middle: int) -> list[Asked]:
        """The objects.

        Args:
            middle: The slice that is meant where none is named.

        Raises:
            UserError: It is not clear which object is meant.
        """
        said = []
        for line in self.lines:
            number = middle if line.slice is None else line.slice
            if line.box is not None:
                said.append(Said(line.name, number, box=line.box))
            if line.point is not None:
                said.append(Said(line.name, number, point=line.point))
        try:
            return grouped(said)
        except UserError as error:
            raise UserError(f"{self.where} line {self.lines[0].number}: {error}") from error

    def describe(self) -> list[dict[str, Any]]:
        """What is asked, as JSON."""
        limits = {"first": self.first, "last": self.last}
        return [
            {"name": line.name, "slice": line.slice, "box": line.box, "point": line.point, **limits}
            for line in self.lines
        ]


def read_prompts(path: Path, items: Sequence[Item]) -> dict[str, ImagePrompts]:
    """Read the file.

    Args:
        path: The file.
        items: The images of the folder.

    Returns:
        By an image's key.

    Raises:
        UserError: A column is missing or unknown, an image is not there, or a line is no prompt.
    """
    named = _names(items)
    found: dict[str, list[tuple[Line, tuple[int | None, int | None]]]] = {}
    for number, row in _rows(path):
        where = f"{path} line {number}"
        keys = named.get(row["image"], [])
        if not keys:
            known = nearest(row["image"], [item.key for item in items]) if len(items) < 1000 else ""
            raise UserError(f"{where}: no image of the folder is called '{row['image']}'{known}")
        if len(keys) > 1:
            both = " or ".join(keys[:2])
            raise UserError(f"{where}: '{row['image']}' may be {both}: write its path in the folder")
        limits = _slice(row, "first", where), _slice(row, "last", where)
        found.setdefault(keys[0], []).append((_line(row, number, where), limits))
    if not found:
        raise UserError(f"{path}: it has no prompt: write a line for each box or point")
    return {key: _of_image(path, lines) for key, lines in found.items()}


def _of_image(path: Path, lines: Sequence[tuple[Line, tuple[int | None, int | None]]]) -> ImagePrompts:
    limits = lines[0][1]
    for line, other in lines:
        if other != limits:
            raise UserError(
                f"{path} line {line.number}: first and last are others than in line {lines[0][0].number} of the same "
                "image: they are the image's: write the same"
            )
    prompts = ImagePrompts(str(path), tuple(line for line, _ in lines), *limits)
    prompts.asked(0)  # what is unclear is told before any work
    return prompts


def _names(items: Sequence[Item]) -> Mapping[str, list[str]]:
    """Keys of the images that each way to write a name may mean: a path in the folder means one only."""
    named: dict[str, list[str]] = {}
    for item in items:
        ways = {item.key, item.name, PurePosixPath(item.key).name, PurePosixPath(item.name).name}
        for way in ways:
            named.setdefault(way, []).append(item.key)
    return {**named, **{item.key: [item.key] for item in items}}


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The lines that are not empty, with their numbers."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            columns = [name.strip() for name in reader.fieldnames or ()]
            _check_columns(path, columns)
            reader.fieldnames = columns
            rows = []
            for row in reader:
                if row.pop(None, None):  # where the values without a column are
                    raise UserError(f"{path} line {reader.line_num}: has more values than the head line has columns")
                values = {name: (row.get(name) or "").strip() for name in COLUMNS}
                if any(values.values()):
                    rows.append((reader.line_num, values))
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in columns"
        raise UserError(f"--prompts {path}: cannot be read: {reason}") from error


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    for name in columns:
        if name not in COLUMNS:
            raise UserError(f"{path}: there is no column '{name}'{nearest(name, COLUMNS)}")
        if columns.count(name) > 1:
            raise UserError(f"{path}: the column '{name}' is there twice: leave one out")
    needed = ["image"]
    for form in (BOX, POINT):
        needed += form if any(name in columns for name in form) else ()
    missing = [name for name in needed if name not in columns]
    if missing:
        raise UserError(f"{path}: the column '{missing[0]}' is missing: the first line names the columns, with commas")
    if len(needed) == 1:
        raise UserError(f"{path}: no column has prompts: boxes are in {', '.join(BOX)}, points in {', '.join(POINT)}")


def _line(row: Mapping[str, str], number: int, where: str) -> Line:
    """The prompts of a line.

    Raises:
        UserError: There is none, or a part of one.
    """
    box, point = _numbers(row, BOX, where), _numbers(row, POINT, where)
    if box is None and point is None:
        raise UserError(f"{where}: has no prompt: fill in {', '.join(BOX)}, or {', '.join(POINT)}")
    if box is not None and not (box[0] < box[2] and box[1] < box[3]):
        raise UserError(f"{where}: x1 must be larger than x0, and y1 than y0: x0,y0 are the upper left corner")
    label = row["label"]
    if label not in ("", "0", "1", "+", "-"):
        raise UserError(f"{where}: the label '{label}': 1 or + is on the object, 0 or - beside it")
    if label and point is None:
        raise UserError(f"{where}: has a label, but no point: fill in x and y, or leave it out")
    said = None if point is None else (point[0], point[1], int(label in ("", "1", "+")))
    corners = None if box is None else (box[0], box[1], box[2], box[3])
    return Line(number, row["name"] or None, _slice(row, "slice", where), corners, said)


def _numbers(row: Mapping[str, str], names: Sequence[str], where: str) -> tuple[float, ...] | None:
    """Numbers of some columns, None where all are empty."""
    texts = [row[name] for name in names]
    if not any(texts):
        return None
    values = []
    for name, text in zip(names, texts, strict=True):
        try:
            values.append(float(text))
        except ValueError:
            values.append(math.nan)
        if not math.isfinite(values[-1]):
            raise UserError(f"{where}: '{text}' in column {name} is no number: fill in {', '.join(names)}")
    return tuple(values)


def _slice(row: Mapping[str, str], name: str, where: str) -> int | None:
    text = row[name]
    if not text or (name == "slice" and text == MIDDLE):
        return None
    if text == MIDDLE:
        raise UserError(f"{where}, column {name}: '{text}' is no limit: give the number of a slice, from 0")
    return parse_slice(text, 0, f"{where}, column {name}")
