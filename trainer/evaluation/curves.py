"""How scores fall as prompts get worse: the mean DSC at each level of noise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trainer.evaluation.tables import Line, Section, label
from trainer.evaluation.told import Told
from trainer.report.markup import UNKNOWN, score, signed
from trainer.report.statistics import ci95_of


@dataclass(frozen=True)
class NoiseCurve:
    """One model's mean DSC over the noise of its prompts.

    Attributes:
        line: Whose it is.
        count: Number of objects, the same at every level and for every model.
        levels: Percent of the box's sides, rising from 0.
        means: Mean DSC at each level.
        bands: Its 95 % confidence interval; None of one object.
    """

    line: Line
    count: int
    levels: tuple[float, ...]
    means: tuple[float, ...]
    bands: tuple[tuple[float, float] | None, ...]


def noise_curves(section: Section) -> list[NoiseCurve]:
    """A curve for each model that was asked with noise."""
    levels = tuple(section.noisy)
    lines = list(section.noisy[0.0]) if levels else []
    found = []
    for line in lines:
        scores = [np.array([row.dsc for row in section.noisy[level][line]], np.float64) for level in levels]
        if len(scores[0]):
            means = tuple(float(values.mean()) for values in scores)
            bands = tuple(ci95_of(values, "mean") for values in scores)
            found.append(NoiseCurve(line, len(scores[0]), levels, means, bands))
    return found


def noise_tables(section: Section) -> list[Told]:
    """The curves in words; nothing where no noise was asked for."""
    curves = noise_curves(section)
    if not curves:
        return []
    levels = curves[0].levels
    columns = ["mean DSC (95 % CI)", *(f"{level:g} %" for level in levels), f"from 0 to {levels[-1]:g} %"]
    lines = []
    for curve in curves:
        cells = [
            score(mean) + (f" ({score(band[0])}–{score(band[1])})" if band else "")
            for mean, band in zip(curve.means, curve.bands, strict=True)
        ]
        change = signed(curve.means[-1] - curve.means[0]) if len(levels) > 1 else UNKNOWN
        lines.append([label(curve.line), *cells, change])
    what = {"box": "each side of the box", "point": "the point"}.get(section.prompt, "the prompt")
    beside = " A moved point may lie beside its object." if section.prompt == "point" else ""
    note = (
        f"The same {curves[0].count:,} objects asked for again, {what} moved at random by up to so many percent of the "
        "box's sides (uniform; SAM2's training draws up to 10 %). Every model gets the same prompts, and a larger "
        f"level moves them farther the same way.{beside}"
    )
    return [Told("Prompt noise: how much does a sloppy prompt cost?", columns, lines, note)]


def noise_summary(section: Section) -> list[dict[str, Any]]:
    """The same as JSON."""
    found = []
    for one in noise_curves(section):
        content = asdict(one)
        model, initial = content.pop("line")
        found.append({"model": model, "initial": initial, **content})
    return found
