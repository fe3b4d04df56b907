"""Curves of several runs in one chart, as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

from trainer.report.boxes import series_mark, series_style
from trainer.report.charts import MOST_POINTS, Frame, nice_ticks, smooth, thin
from trainer.report.curves import Curve

_MARKS = 5
"""Marks on a curve, so that it is told from others without colours."""


def lines_chart(
    curves: Mapping[str, Curve],
    *,
    name: str,
    numbers: Mapping[str, int],
    bounds: tuple[float, float] | None = None,
    smoothed: bool = True,
) -> str:
    """A line for each run over optimiser steps.

    Args:
        curves: Values by step of each run, at least one value each.
        name: Of the values.
        numbers: Of each run which colour and mark it has.
        bounds: Least and greatest value that the axis shows; by default 0 and what the curves need.
        smoothed: Whether the lines are smoothed; what is logged for every batch is.

    Returns:
        An ``svg`` element that needs the page's style sheet.
    """
    drawn = {}
    for who, curve in curves.items():
        steps, values = np.array(list(curve), np.float64), np.array(list(curve.values()), np.float64)
        drawn[who] = (steps, smooth(values) if smoothed else values)
    every = np.concatenate([values for _, values in drawn.values()])
    low, high = bounds or (min(0.0, float(every.min())), float(every.max()))
    ticks = nice_ticks(low, high, 4)
    first, last = (float(end(end(steps) for steps, _ in drawn.values())) for end in (min, max))
    frame = Frame(x=(first, last), y=(ticks[0], ticks[-1]))
    across = [tick for tick in nice_ticks(first, last) if first <= tick <= last]
    parts, words = [], []
    for who, (steps, values) in drawn.items():
        xs, ys = (thin(column, MOST_POINTS) for column in (steps, values))
        places = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), _MARKS)).round().astype(int))
        marks = "".join(series_mark(numbers[who], frame.across(xs[place]), frame.up(ys[place])) for place in places)
        said = f"{who}: from {values[0]:.3f} at step {steps[0]:.0f} to {values[-1]:.3f} at step {steps[-1]:.0f}"
        style = f"line dist {series_style(numbers[who])}"
        parts.append(f'<g class="{style}"><title>{escape(said)}</title><path d="{frame.path(xs, ys)}"/>{marks}</g>')
        words.append(said)
    label = f"{name}{', smoothed' if smoothed else ''}; {'; '.join(words)}"
    return frame.picture(label, frame.grid(ticks, name), frame.below(across, "optimiser step"), *parts)
