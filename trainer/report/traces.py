"""What was trained on, by the traces of all processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.report.tables import Row, read_rows


def read_traces(root: Path) -> tuple[frozenset[str], int] | None:
    """Read ``trace.csv`` of a run and those of its other ranks, ``trace-rank1.csv`` and so on.

    Returns:
        Keys of the samples that were trained on, and the number of optimiser steps; None without any trace.

    Raises:
        UserError: A trace is damaged.
    """
    paths = sorted(root.glob("trace*.csv"))
    keys: set[str] = set()
    steps = 0
    for path in paths:
        for step, seen in read_rows(path, _batch, "trace of samples"):
            keys.update(seen)
            steps = max(steps, step + 1)  # counted from 0
    return (frozenset(keys), steps) if paths else None


def read_skipped(root: Path) -> frozenset[str]:
    """Return the keys that ``skipped.csv`` of a run and those of its other ranks name.

    Raises:
        UserError: A table is damaged.
    """
    paths = sorted(root.glob("skipped*.csv"))
    return frozenset(
        key for path in paths for key in read_rows(path, lambda row: row["key"], "list of skipped samples")
    )


def encode_keys(keys: Sequence[str]) -> str:
    """Return keys as a cell of a trace, separated by spaces."""
    return " ".join(key.replace("%", "%25").replace(" ", "%20") for key in keys)


def decode_keys(text: str) -> list[str]:
    """Return the keys in a cell of a trace."""
    return [key.replace("%20", " ").replace("%25", "%") for key in text.split()]


def read_order(root: Path) -> dict[tuple[int, int], list[str]]:
    """Return which samples each optimiser step learnt from, over all ranks and in the order of the epoch.

    Of a run that was stopped and went on, lines count whose work was saved: of an earlier attempt those before the
    first step of every later one.

    Returns:
        Keys of samples by (epoch, step), in the order of steps.

    Raises:
        UserError: A trace is damaged.
    """
    lines: dict[tuple[int, int, int, int], tuple[int, list[str]]] = {}  # of one that was done twice, the later counts
    for path in root.glob("trace*.csv"):
        rank = int(path.stem.removeprefix("trace").removeprefix("-rank") or 0)
        for attempt, epoch, batch, step, keys in read_rows(path, _line, "trace of samples"):
            lines[attempt, epoch, batch, rank] = (step, keys)
    first: dict[int, int] = {}
    for (attempt, *_), (step, _) in lines.items():
        first[attempt] = min(step, first.get(attempt, step))
    order: dict[tuple[int, int], list[str]] = {}
    for (attempt, epoch, _, _), (step, keys) in sorted(lines.items()):
        if all(step < begin for later, begin in first.items() if later > attempt):
            order.setdefault((epoch, step), []).extend(keys)
    return order


def _line(row: Row) -> tuple[int, int, int, int, list[str]]:
    numbers = (int(row.get("attempt") or 0), int(row["epoch"]), int(row["batch"]), int(row["step"]))
    return (*numbers, decode_keys(row["keys"]))


def _batch(row: Row) -> tuple[int, list[str]]:
    return int(row["step"]), decode_keys(row["keys"])
