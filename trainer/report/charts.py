"""Charts as inline SVG; colours come from the page's style sheet, so that they follow light and dark.

Shapes: N values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from trainer.report.curves import Curve
from trainer.report.markup import score, signed
from trainer.report.records import Jitter

MOST_POINTS = 400
"""Points of a curve as drawn; longer ones are averaged in bins."""
MOST_LINES = 300
"""Targets in the paired plot; of more, evenly chosen ones are drawn."""


@dataclass(frozen=True)
class Frame:
    """A plot's area in a picture and the values at its edges.

    Attributes:
        x: Values at the left and right edge.
        y: Values at the lower and upper edge.
        width: Of the picture.
        height: Of the picture.
        margins: Left, top, right and bottom of the area.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = 480
    height: int = 270
    margins: tuple[int, int, int, int] = (44, 14, 14, 40)

    def across(self, value: float) -> float:
        """Place of a value of x."""
        left, _, right, _ = self.margins
        share = (value - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        return left + share * (self.width - left - right)

    def up(self, value: float) -> float:
        """Place of a value of y."""
        _, top, _, bottom = self.margins
        share = (value - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        return self.height - bottom - share * (self.height - top - bottom)

    def grid(self, ticks: Sequence[float], label: str) -> str:
        """Horizontal lines at values of y, with their numbers."""
        left, right = self.margins[0], self.width - self.margins[2]
        lines = []
        for tick in ticks:
            y = self.up(tick)
            lines.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            lines.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
        middle = (self.up(self.y[0]) + self.up(self.y[1])) / 2
        turned = f'transform="translate(11 {middle:.1f}) rotate(-90)" text-anchor="middle"'
        return "".join(lines) + f'<text class="axis turned" {turned}>{escape(label)}</text>'

    def below(self, ticks: Sequence[float], label: str) -> str:
        """Numbers under the area at values of x."""
        y = self.height - self.margins[3]
        marks = [
            f'<text x="{self.across(tick):.1f}" y="{y + 17}" text-anchor="middle">{tick:,.6g}</text>' for tick in ticks
        ]
        middle = (self.across(self.x[0]) + self.across(self.x[1])) / 2
        axis = f'<text class="axis" x="{middle:.1f}" y="{y + 34}" text-anchor="middle">{escape(label)}</text>'
        return "".join(marks) + axis

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        """A line through points, as the data of a path."""
        places = [f"{self.across(x):.1f} {self.up(y):.1f}" for x, y in zip(xs, ys, strict=True)]
        return "M" + "L".join(places)

    def picture(self, label: str, *parts: str) -> str:
        """The whole picture; the label says what it shows."""
        box = f"0 0 {self.width} {self.height}"
        return f'<svg class="chart" viewBox="{box}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about so many."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def smooth(values: np.ndarray, width: float | None = None) -> np.ndarray:
    """Values (N,) averaged with a Gaussian window, which is cut off (not padded) at the ends.

    Args:
        values: (N,) finite values.
        width: Standard deviation in values; by default a thirtieth of the course.
    """
    width = width or max(1.0, len(values) / 30)
    reach = min(math.ceil(3 * width), max(len(values) - 1, 0))
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    weights = np.convolve(np.ones(len(values)), window)[reach : reach + len(values)]
    averaged: np.ndarray = np.convolve(values, window)[reach : reach + len(values)] / weights
    return averaged


def line_chart(
    curve: Curve, *, name: str, bounds: tuple[float, float] | None = None, points: Curve | None = None
) -> str:
    """A curve over steps: faint as logged, strong as smoothed.

    Args:
        curve: Values by step, at least one.
        name: Of the values.
        bounds: Least and greatest value that the axis shows; by default 0 and what the curve needs.
        points: Values to be marked besides, such as of a validation.
    """
    steps, values = (np.array(column, np.float64) for column in (list(curve), list(curve.values())))
    averaged = smooth(values)
    marked = points or {}
    low, high = bounds or (min(0.0, values.min()), values.max())
    ticks = nice_ticks(float(low), float(high), 4)
    last = max([float(steps[-1]), *map(float, marked)])
    frame = Frame(x=(float(steps[0]), last), y=(ticks[0], ticks[-1]))
    across = [tick for tick in nice_ticks(*frame.x) if frame.x[0] <= tick <= frame.x[1]]
    drawn_steps, drawn, drawn_averaged = (thin(column) for column in (steps, values, averaged))
    dots = "".join(
        f'<circle class="mark" cx="{frame.across(step):.1f}" cy="{frame.up(value):.1f}" r="3.5">'
        f"<title>validation, step {step}: {value:.3f}</title></circle>"
        for step, value in marked.items()
    )
    label = (
        f"{name} from {averaged[0]:.3f} at step {steps[0]:.0f} to {averaged[-1]:.3f} at step {steps[-1]:.0f}, smoothed"
    )
    return frame.picture(
        label,
        frame.grid(ticks, name),
        frame.below(across, "optimiser step"),
        f'<path class="raw" d="{frame.path(drawn_steps, drawn)}"/>',
        f'<path class="smooth" d="{frame.path(drawn_steps, drawn_averaged)}"/>',
        dots,
    )


def paired_plot(pairs: Sequence[tuple[str, float, float]], name: str) -> str:
    """Box plots before and after, and a line for every target.

    Args:
        pairs: What a line shows when pointed at, the score before and the score after; at least one.
        name: Of the scores.
    """
    before, after = (np.array([pair[side] for pair in pairs], np.float64) for side in (1, 2))
    ticks = nice_ticks(min(before.min(), after.min(), 0.9), 1.0)
    frame = Frame(x=(0, 1), y=(ticks[0], ticks[-1]), height=340, margins=(44, 14, 14, 30))
    left, right = 0.27, 0.73
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), MOST_LINES)).round().astype(int))
    lines = []
    for number in chosen:
        title, low, high = pairs[number]
        kind = "fell" if high < low else "rose"
        path = frame.path((left, right), (low, high))
        ends = "".join(
            f'<circle cx="{frame.across(x):.1f}" cy="{frame.up(y):.1f}" r="2.4"/>'
            for x, y in ((left, low), (right, high))
        )
        tip = f"{title}: {score(low)} → {score(high)} ({signed(high - low)})"
        lines.append(f'<g class="pair {kind}"><title>{escape(tip)}</title><path d="{path}"/>{ends}</g>')
    boxes = _box(frame, 0.13, before, "before") + _box(frame, 0.87, after, "after")
    y = frame.height - 9
    words = "".join(
        f'<text class="axis" x="{frame.across(x):.1f}" y="{y}" text-anchor="middle">{word}</text>'
        for x, word in ((0.2, "before tuning"), (0.8, "after tuning"))
    )
    label = (
        f"{name} of {len(pairs)} targets: median {np.median(before):.3f} before and {np.median(after):.3f} after tuning"
    )
    strength = min(0.45, max(0.12, 20 / len(chosen)))  # many lines are faint, so that they show where most of them run
    drawn = f'<g style="--strength:{strength:.2f}">{"".join(lines)}</g>'
    return frame.picture(label, frame.grid(ticks, name), drawn, boxes, words)


def jitter_chart(curves: Mapping[str, Jitter]) -> str:
    """Mean DSC over the shift of the box, a line for each evaluation.

    Args:
        curves: By ``before`` and ``after``, at least one of them.
    """
    values = [value for curve in curves.values() for value in curve.dsc]
    shifts = sorted({shift for curve in curves.values() for shift in curve.shifts})
    ticks = nice_ticks(min(values), max(values), 4)
    frame = Frame(x=(shifts[0], shifts[-1]), y=(ticks[0], ticks[-1]))
    lines, words = [], []
    for name, curve in curves.items():
        dots = "".join(
            f'<circle cx="{frame.across(shift):.1f}" cy="{frame.up(value):.1f}" r="3.5">'
            f"<title>{name} tuning, {shift:g} px: {value:.3f}</title></circle>"
            for shift, value in zip(curve.shifts, curve.dsc, strict=True)
        )
        lines.append(f'<g class="jitter {name}"><path d="{frame.path(curve.shifts, curve.dsc)}"/>{dots}</g>')
        ends = f"{curve.dsc[0]:.3f} at {curve.shifts[0]:g} px and {curve.dsc[-1]:.3f} at {curve.shifts[-1]:g} px"
        words.append(f"{name} tuning {max(curve.dsc):.3f} at best, {ends}")
    return frame.picture(
        f"mean DSC by shift of the box: {'; '.join(words)}",
        frame.grid(ticks, "mean DSC"),
        frame.below(shifts, "shift of the box's sides (px)"),
        "".join(lines),
    )


def _box(frame: Frame, x: float, values: np.ndarray, kind: str) -> str:
    """Median, quartiles, and whiskers to the last values within 1.5 interquartile ranges."""
    low, median, high = np.percentile(values, [25, 50, 75])
    reach = 1.5 * (high - low)
    bottom, top = values[values >= low - reach].min(), values[values <= high + reach].max()
    place, half = frame.across(x), 22
    upper, lower = frame.up(high), frame.up(low)
    title = f"{kind}: median {median:.3f}, quartiles {low:.3f} and {high:.3f}, n = {len(values)}"
    whiskers = "".join(
        f'<path d="M{place:.1f} {frame.up(a):.1f}V{frame.up(b):.1f}M{place - 9:.1f} {frame.up(b):.1f}h18"/>'
        for a, b in ((low, bottom), (high, top))
    )
    return (
        f'<g class="box {kind}"><title>{title}</title>{whiskers}'
        f'<rect x="{place - half:.1f}" y="{upper:.1f}" width="{2 * half}" height="{max(lower - upper, 1):.1f}"/>'
        f'<path class="median" d="M{place - half:.1f} {frame.up(median):.1f}h{2 * half}"/></g>'
    )


def thin(values: np.ndarray, most: int = MOST_POINTS) -> list[float]:
    """At most so many values, each the mean of a bin of values (N,)."""
    bins = np.array_split(values, min(len(values), most))
    return [float(part.mean()) for part in bins]
