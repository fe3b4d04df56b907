"""Tables in words, which page and Markdown share, and how they write sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.report.markup import MINUS, UNKNOWN

Cells = list[str]
TITLES = {"2d": "Images", "3d": "Volumes", "video": "Videos"}
"""What sets of a kind are called."""


@dataclass(frozen=True)
class Told:
    """A table.

    Attributes:
        title: What it shows.
        columns: Headings.
        lines: Cells.
        note: How to read it; empty where that is plain.
        words: Positions of the columns that are text; the others are numbers.
    """

    title: str
    columns: Cells
    lines: list[Cells]
    note: str = ""
    words: tuple[int, ...] = (0,)

    @property
    def markdown(self) -> str:
        """Heading, note and table."""
        return "\n\n".join(
            part for part in (f"### {self.title}", self.note, markdown_table(self.columns, self.lines)) if part
        )


def markdown_table(columns: Cells, lines: Sequence[Cells]) -> str:
    """A table as Markdown."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def amount(value: float | None) -> str:
    """A size or a difference of sizes: three significant digits, or all before the point."""
    if value is None:
        return UNKNOWN
    digits = f"{abs(value):,.0f}" if abs(value) >= 999.5 else f"{abs(value):.3g}"
    return (MINUS if value < 0 and float(digits.replace(",", "")) else "") + digits


def between(bounds: tuple[float, float] | None) -> str:
    """Two ends of an interval of sizes, which are not torn apart."""
    return UNKNOWN if bounds is None else f"{amount(bounds[0])}\u00a0to\u00a0{amount(bounds[1])}"


def finite(value: Any) -> Any:
    """The value with null for what JSON cannot say."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
