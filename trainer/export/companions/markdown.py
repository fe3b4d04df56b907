"""Small pieces of Markdown; every text that comes from a file is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

NOT_RECORDED = "not recorded"
NOT_GIVEN = "not given"


def text(content: Any, absent: str = NOT_RECORDED) -> str:
    """Content on one line, as a cell of a table or part of a sentence; nothing becomes what says so."""
    if isinstance(content, bool):
        return "yes" if content else "no"
    if isinstance(content, int):
        return f"{content:,}"
    line = " ".join(str("" if content is None else content).split())
    for sign, shown in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*")):
        line = line.replace(sign, shown)
    return line or absent


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; nothing without rows."""
    lines = [_line(text(cell) for cell in row) for row in rows]
    return "\n".join([_line(columns), _line("---" for _ in columns), *lines]) if lines else ""


def bullets(lines: Iterable[str]) -> str:
    """A list of lines that are not empty."""
    return "\n".join(f"- {text(line)}" for line in lines if line)


def section(title: str, *body: str) -> str:
    """A section with a heading; nothing without a body."""
    content = "\n\n".join(part for part in body if part)
    return f"## {title}\n\n{content}\n" if content else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
