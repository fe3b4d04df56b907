"""What was trained on, by the traces of all processes."""

from __future__ import annotations

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


def _batch(row: Row) -> tuple[int, list[str]]:
    return int(row["step"]), row["keys"].split()
