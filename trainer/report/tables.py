"""Tables that a training appends to, and may have been killed in the middle of."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from data_shards.errors import UserError

Row = dict[str, str]
T = TypeVar("T")

_DAMAGE = (ValueError, KeyError, TypeError, OverflowError)


def read_rows(path: Path, convert: Callable[[Row], T], what: str) -> Iterator[T]:
    """Convert the rows of a table; a last row that was cut or cannot be converted is left out.

    Args:
        path: The table, with a line of headings.
        convert: Makes something of a row; it may raise what int, float and a missing column raise.
        what: What the table is, for the error.

    Raises:
        UserError: The table is damaged elsewhere than in its last row.
    """
    try:
        complete = _ends_with_line(path)
        with path.open(newline="", encoding="utf-8") as handle:
            last: Row | None = None
            for row in csv.DictReader(handle):
                if last is not None:
                    yield convert(_whole(last))
                last = row
        if last is None or not complete:  # the rest of a number cannot be missed: 11 may be the start of 110
            return
        try:
            converted = convert(_whole(last))
        except _DAMAGE:
            return
        yield converted
    except (OSError, csv.Error, *_DAMAGE) as error:
        raise UserError(f"{path}: not a readable {what} ({type(error).__name__}: {error})") from error


def _ends_with_line(path: Path) -> bool:
    with path.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(size - 1, 0))
        return handle.read(1) in (b"\n", b"\r")


def _whole(row: Row) -> Row:
    if None in row or None in row.values():
        raise ValueError("a row has more or fewer cells than there are columns")
    return row
