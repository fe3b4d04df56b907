"""The course of a training, put together from the logs of all its attempts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from trainer.report.tables import Row, read_rows

Curve = dict[int, float]
"""Value by optimiser step, in rising order of steps."""


def read_curves(logs: Path) -> dict[str, Curve]:
    """Merge ``version_*/metrics.csv``.

    A run that was resumed has one version for each attempt: from the first step that an attempt trained, it replaces
    what earlier attempts logged there and after. Where attempts share a step, the later one counts.

    Args:
        logs: The folder of the versions; it may be absent.

    Returns:
        Curves by column, such as ``train/loss``; without columns that have no finite value.

    Raises:
        UserError: A log is damaged, other than in its last row.
    """
    merged: dict[str, Curve] = {}
    for version in sorted(logs.glob("version_*"), key=_number):
        path = version / "metrics.csv"
        if not path.is_file():
            continue
        columns = _read(path)
        trained = [step for name, curve in columns.items() if name.startswith("train/") for step in curve]
        if trained:
            redone = min(trained)
            merged = {name: {s: v for s, v in curve.items() if s < redone} for name, curve in merged.items()}
        for name, curve in columns.items():
            merged[name] = merged.get(name, {}) | curve
    # Lightning gives a validation the number of the last step before it; elsewhere it has the number of steps taken
    later = {name: int(name.startswith("val/")) for name in merged}
    return {name: {s + later[name]: v for s, v in sorted(curve.items())} for name, curve in merged.items() if curve}


def images_per_second(curves: Mapping[str, Curve]) -> float | None:
    """Median of what was logged, without the first, which includes the warm-up."""
    rates = list(curves.get("train/images_per_second", {}).values())[1:]
    return float(statistics.median(rates)) if rates else None


def peak_memory_gib(curves: Mapping[str, Curve]) -> float | None:
    """Most memory of a training: of tensors on a GPU, or else of the whole process; see `on_gpu`."""
    found = curves.get("train/gpu_memory_gib") or curves.get("train/cpu_memory_gib") or {}
    return max(found.values(), default=None)


def on_gpu(curves: Mapping[str, Curve]) -> bool:
    """Whether the memory of a GPU was logged."""
    return "train/gpu_memory_gib" in curves


def _number(version: Path) -> tuple[int, str]:
    digits = version.name.removeprefix("version_")
    return (int(digits) if digits.isdecimal() else -1), version.name


def _read(path: Path) -> dict[str, Curve]:
    """Curves of one log; blank cells and values that are not finite are left out."""
    columns: dict[str, Curve] = {}
    for step, values in read_rows(path, _values, "log of metrics"):
        for name, value in values.items():
            columns.setdefault(name, {})[step] = value
    return columns


def _values(row: Row) -> tuple[int, dict[str, float]]:
    values = {name: float(cell) for name, cell in row.items() if name not in ("step", "epoch") and cell}
    return int(float(row["step"])), {name: value for name, value in values.items() if math.isfinite(value)}
