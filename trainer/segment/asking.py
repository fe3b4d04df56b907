"""From a command line's prompts to the objects that are asked about."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_shards.errors import UserError, nearest
from trainer.volumes.asked import Asked
from trainer.volumes.scan import Scan

ONLY = "object"
"""What an object without a name is called; several are numbered."""
MIDDLE = "middle"

_FORM = re.compile(r"(?:(?P<slice>[^:=]*):)?(?P<numbers>[^:=]*)(?:=(?P<name>.*))?")
_EXAMPLE = {"--box": "x0,y0,x1,y1, as in --box 40:10,20,90,120=liver", "--point": "x,y, as in --point 40:52,70,+=liver"}


@dataclass(frozen=True)
class Said:
    """One prompt, before it is known which make one object: a box (x0, y0, x1, y1) or a point (x, y, label)."""

    name: str | None
    slice: int
    box: tuple[float, float, float, float] | None = None
    point: tuple[float, float, int] | None = None


def parse_slice(text: str, middle: int, option: str) -> int:
    """Number of a slice from ``middle`` or a whole number.

    Raises:
        UserError: It is neither.
    """
    if text == MIDDLE:
        return middle
    if not re.fullmatch(r"-?\d+", text):
        raise UserError(f"{option}: '{text}' is no slice: give its number, from 0, or {MIDDLE}")
    return int(text)


def parse_labels(text: str | None) -> dict[int, str] | None:
    """Names of labels by value, from ``1=liver,2=spleen``; a value alone keeps the name that the file has for it.

    Raises:
        UserError: It has another form, or a value or a name twice.
    """
    if text is None:
        return None
    found: dict[int, str] = {}
    for part in text.split(","):
        value, _, name = part.partition("=")
        if not value.strip().isdecimal() or not int(value):
            raise UserError(f"--labels {text}: '{part}' is no label: write values with names, as in 1=liver,2=spleen")
        if int(value) in found or (name.strip() and name.strip() in found.values()):
            raise UserError(f"--labels {text}: '{part}' says again what was said before")
        found[int(value)] = name.strip()
    return found


def named(values: Sequence[int], wanted: Mapping[int, str] | None, labels: Scan, where: str) -> dict[int, str]:
    """Choose among the values of a label map, and name them.

    Args:
        values: What there is, without background.
        wanted: What `parse_labels` gave.
        labels: The label map; some formats have names.
        where: The part of it that the values are of, for messages.

    Raises:
        UserError: A label is wanted that is not there, or there is none at all.
    """
    if not values:
        raise UserError(f"{labels.name}: the mask is empty{where}: there is no object to show")
    for value in wanted or ():
        if value not in values:
            known = nearest(str(value), map(str, values))
            raise UserError(f"--labels {value}: {labels.name} has no such label{where}{known}")
    own = getattr(labels, "label_names", None) or {}
    chosen = wanted if wanted is not None else dict.fromkeys(values, "")
    return {value: name or own.get(value) or f"label {value}" for value, name in chosen.items()}


def asked_of(boxes: Sequence[str], points: Sequence[str], middle: int) -> list[Asked]:
    """Objects from ``--box`` and ``--point``: those of one name are one object, those without are told apart by boxes.

    Args:
        boxes: Each ``[SLICE:]x0,y0,x1,y1[=name]``.
        points: Each ``[SLICE:]x,y[,+|-][=name]``.
        middle: Number of the middle slice, which is meant where none is named.

    Raises:
        UserError: One has another form, a box has no area, or it is not clear which object is meant.
    """
    return grouped([_parse_box(text, middle) for text in boxes] + [_parse_point(text, middle) for text in points])


def grouped(said: Sequence[Said]) -> list[Asked]:
    """Objects from prompts: those of one name are one object, those without are told apart by boxes.

    Raises:
        UserError: It is not clear which object is meant.
    """
    loose = [one for one in said if one.name is None]
    several = sum(one.box is not None for one in loose) > 1
    if several and any(one.point for one in loose):
        raise UserError("a point: of several boxes without a name, which is meant? Give the point and its box one name")
    groups: dict[str, list[Said]] = {}
    for number, one in enumerate(loose, start=1):
        groups.setdefault(f"{ONLY} {number}" if several else ONLY, []).append(one)
    for one in said:
        if one.name is not None:
            groups.setdefault(one.name, []).append(one)
    return [_object(name, parts) for name, parts in groups.items()]


def masks_of(picture: np.ndarray, names: Mapping[int, str]) -> dict[str, np.ndarray]:
    """Masks (H, W) bool by name from a slice (H, W) of a label map."""
    return {name: picture == value for value, name in names.items()}


def _object(name: str, parts: Sequence[Said]) -> Asked:
    slices = sorted({part.slice for part in parts})
    if len(slices) > 1:
        raise UserError(f"'{name}' is shown on slices {slices[0]} and {slices[1]}: show an object on one slice")
    boxes = [part.box for part in parts if part.box is not None]
    if len(boxes) > 1:
        raise UserError(f"'{name}' has {len(boxes)} boxes: give each object a name of its own")
    points = tuple(part.point for part in parts if part.point is not None)
    return Asked(name, slices[0], boxes[0] if boxes else None, points)


def _parse_box(text: str, middle: int) -> Said:
    name, number, parts = _split("--box", text, middle)
    if len(parts) != 4:
        raise _wrong("--box", text)
    x0, y0, x1, y1 = (_number("--box", text, part) for part in parts)
    if not (x0 < x1 and y0 < y1):
        raise UserError(f"--box {text}: x1 must be larger than x0, and y1 than y0: x0,y0 are the upper left corner")
    return Said(name, number, box=(x0, y0, x1, y1))


def _parse_point(text: str, middle: int) -> Said:
    name, number, parts = _split("--point", text, middle)
    sign = parts.pop() if len(parts) == 3 else "+"
    if len(parts) != 2 or sign not in ("+", "-"):
        raise _wrong("--point", text)
    x, y = (_number("--point", text, part) for part in parts)
    return Said(name, number, point=(x, y, int(sign == "+")))


def _split(option: str, text: str, middle: int) -> tuple[str | None, int, list[str]]:
    """Name, slice and numbers of a prompt."""
    match = _FORM.fullmatch(text)
    if match is None or match["name"] == "":
        raise _wrong(option, text)
    number = middle if match["slice"] is None else parse_slice(match["slice"], middle, f"{option} {text}")
    return match["name"], number, [part.strip() for part in match["numbers"].split(",")]


def _number(option: str, text: str, part: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _wrong(option, text)
    return value


def _wrong(option: str, text: str) -> UserError:
    return UserError(f"{option} {text}: give {_EXAMPLE[option]}")
