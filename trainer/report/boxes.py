"""Box plots by group, such as by modality, with a box for each model or state, as inline SVG.

Boxes lie: names of groups stand above them and are readable on a phone, however long they are.
Shapes: N values.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from trainer.report.charts import Frame, nice_ticks

MOST_OUTLIERS = 40
"""Dots beside a box; of more, evenly chosen ones are drawn, the outermost always."""
COLOURS = 6
"""Colours of series in the page's style sheet: ``.s0`` (grey, for what others are compared with) to ``.s5``."""

_WIDTH = 480
_LEFT, _RIGHT = 10, 14
_ROW, _BOX, _NAME, _GAP = 19, 13, 19, 12
"""Heights: of a series, its box, a group's name and the space below a group."""
_LETTER = 8.4
"""Width of a letter, in pixels, on average, as large as the style sheet makes it on a phone."""
_LONGEST = 40
"""Letters of a group's name, and of a series' in the legend; longer ones are cut, and whole where pointed at."""
_MARKS = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-3.6-3.6h7.2v7.2h-7.2z",
    "triangle": "M0-4.6L4.6 3.6h-9.2z",
    "diamond": "M0-5L5 0L0 5L-5 0z",
    "cross": "M-4.5-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z",
    "fallen": "M0 4.6L4.6-3.6h-9.2z",
    "bar": "M-2-5h4v10h-4z",
}
"""Shapes on the medians, about (0, 0): with `COLOURS` they tell 42 series apart."""

Groups = Mapping[str, Mapping[str, Sequence[float] | np.ndarray]]
"""Groups in the order in which they are drawn → names of series → values (N,)."""


def box_plot(
    groups: Groups, *, name: str, label: str = "", bounds: tuple[float, float] | None = None, smallest: float = 0.0
) -> str:
    """Draw groups one below the other, and in each a box for every series.

    A box shows quartiles and median, its whiskers reach to the last value within 1.5 interquartile ranges (Tukey 1977),
    and values beyond are dots. Series differ in colour, in the mark on their median, and the first has a dashed line:
    it is what the others are compared with.

    Args:
        groups: Groups in order → series → values (N,). A group may lack a series; values that are not finite are not
            drawn, and their number is said.
        name: Of the values, such as ``DSC``.
        label: What the chart shows, for who does not see it; by default made from `name`.
        bounds: Ends of the axis; by default what the values need, up to 1 where none is above.
        smallest: Where no `bounds` are given: the axis begins no lower than this.

    Returns:
        An ``svg`` element that needs the page's style sheet.

    Raises:
        ValueError: No group has a finite value.
    """
    kept = {group: {who: _finite(values) for who, values in series.items()} for group, series in groups.items()}
    drawn = [values for series in kept.values() for values in series.values() if values.size]
    if not drawn:
        raise ValueError("there are no values to draw")
    names = list(dict.fromkeys(itertools.chain.from_iterable(groups.values())))
    lines = _legend_lines(names) if len(names) > 1 else []
    ticks = _ticks(np.concatenate(drawn), bounds, smallest)
    tops, bottom = [], 20 * len(lines) + 6
    for series in kept.values():
        tops.append(bottom)
        bottom += _NAME + _ROW * max(1, sum(values.size > 0 for values in series.values())) + _GAP
    margins = (_LEFT, 20 * len(lines), _RIGHT, 40)
    frame = Frame(x=(ticks[0], ticks[-1]), y=(0, 1), width=_WIDTH, height=bottom + 40, margins=margins)
    grid = "".join(f'<path class="grid" d="M{frame.across(tick):.1f} {20 * len(lines)}V{bottom}"/>' for tick in ticks)
    parts = [
        _group(frame, top, group, series, names, _lost(groups[group]))
        for top, (group, series) in zip(tops, kept.items(), strict=True)
    ]
    title = label or f"{name}: box plots of {len(groups)} groups"
    words = f"<desc>{escape(_described(kept))}</desc>"
    return frame.picture(title, words, _legend(lines, names), grid, *parts, frame.below(ticks, name))


def quartiles(values: np.ndarray) -> tuple[float, float, float, float, float]:
    """Lower whisker, lower quartile, median, upper quartile and upper whisker of values (N,), N at least 1."""
    low, median, high = (float(value) for value in np.percentile(values, [25, 50, 75]))
    reach = 1.5 * (high - low)
    inside = values[(values >= low - reach) & (values <= high + reach)]
    # between two values a quartile is interpolated, and may lie beyond the last one that is within reach
    return min(float(inside.min()), low), low, median, high, max(float(inside.max()), high)


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, np.float64).ravel()
    return array[np.isfinite(array)]


def _lost(series: Mapping[str, Sequence[float] | np.ndarray]) -> int:
    """How many values of a group are not finite."""
    return sum(int((~np.isfinite(np.asarray(values, np.float64))).sum()) for values in series.values())


def _ticks(values: np.ndarray, bounds: tuple[float, float] | None, smallest: float) -> list[float]:
    low, high = bounds or (max(float(values.min()), smallest), float(values.max()))
    if bounds is None and high <= 1.0 and low >= 0.0:
        low, high = min(low, 0.9), 1.0
    return nice_ticks(low, high)


def _group(
    frame: Frame, top: int, group: str, series: Mapping[str, np.ndarray], names: Sequence[str], lost: int
) -> str:
    """A group's name with its number of values, and its boxes."""
    counts = sorted({values.size for values in series.values()})
    n = f"n = {counts[0]:,}" if len(counts) == 1 else f"n = {counts[0]:,} to {counts[-1]:,}"
    more = f", {lost:,} not finite" if lost else ""
    heading = (
        f'<text class="axis group" x="{_LEFT}" y="{top + 13}"><title>{escape(group)}</title>{escape(_short(group))}'
        f'<tspan class="count" dx="8">{n}{more}</tspan></text>'
    )
    found = [(who, values) for who, values in series.items() if values.size]
    boxes = [
        _box(frame, top + _NAME + _ROW * place + _ROW / 2, group, who, values, names.index(who))
        for place, (who, values) in enumerate(found)
    ]
    return f"<g>{heading}{''.join(boxes)}</g>"


def _box(frame: Frame, y: float, group: str, who: str, values: np.ndarray, number: int) -> str:
    start, low, median, high, end = quartiles(values)
    left, right, half = frame.across(low), frame.across(high), _BOX / 2
    tip = (
        f"{group}, {who}: median {median:.3f}, quartiles {low:.3f} and {high:.3f}, whiskers {start:.3f} and {end:.3f}, "
        f"n = {len(values):,}"
    )
    whiskers = "".join(
        f'<path d="M{frame.across(a):.1f} {y:.1f}H{frame.across(b):.1f}m0-4v8"/>'
        for a, b in ((low, start), (high, end))
    )
    beyond = np.unique([round(frame.across(value), 1) for value in values[(values < start) | (values > end)]])
    chosen = beyond[np.unique(np.linspace(0, len(beyond) - 1, min(len(beyond), MOST_OUTLIERS)).round().astype(int))]
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.6"/>' for x in chosen)
    middle = frame.across(median)
    start_tag = f'<g class="dist {series_style(number)}"><title>{escape(tip)}</title>'
    if len(values) == 1:  # a box of one value would only look like a damaged one
        return f"{start_tag}{series_mark(number, middle, y)}</g>"
    return (
        f"{start_tag}{whiskers}"
        f'<rect x="{left:.1f}" y="{y - half:.1f}" width="{max(right - left, 1):.1f}" height="{_BOX}"/>'
        f'<path class="median" d="M{middle:.1f} {y - half:.1f}v{_BOX}"/>{series_mark(number, middle, y)}{dots}</g>'
    )


def series_style(number: int) -> str:
    """The class of a series, which gives its colour: the first is grey and dashed, the next ones go round."""
    return f"s{number if number < COLOURS else 1 + (number - 1) % (COLOURS - 1)}"


def series_mark(number: int, x: float, y: float) -> str:
    """The mark of a series at a place of a picture."""
    shape = list(_MARKS.values())[number % len(_MARKS)]
    return f'<path class="point" transform="translate({x:.1f} {y:.1f})" d="{shape}"/>'


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _legend_lines(names: Sequence[str]) -> list[list[int]]:
    """Positions of the series in each line of the legend."""
    lines: list[list[int]] = [[]]
    used = 0.0
    for number, name in enumerate(names):
        width = 34 + _LETTER * len(_short(name))
        if lines[-1] and used + width > _WIDTH - _LEFT - _RIGHT:
            lines.append([])
            used = 0.0
        lines[-1].append(number)
        used += width
    return lines


def _legend(lines: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Colour, mark and name of every series."""
    parts = []
    for row, line in enumerate(lines):
        x, y = float(_LEFT), 20 * row + 8
        for number in line:
            sample = f'<rect x="{x:.1f}" y="{y - 5}" width="16" height="10"/>{series_mark(number, x + 8, y)}'
            parts.append(f'<g class="dist {series_style(number)}">{sample}</g>')
            parts.append(f'<text class="axis" x="{x + 21:.1f}" y="{y + 4}">{escape(_short(names[number]))}</text>')
            x += 34 + _LETTER * len(_short(names[number]))
    return "".join(parts)


def _described(groups: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Medians in words."""
    found = []
    for group, series in groups.items():
        medians = [f"{who} {np.median(values):.3f} (n {len(values)})" for who, values in series.items() if values.size]
        found.append(f"{group}: {', '.join(medians) or 'no value'}")
    return f"Medians. {'; '.join(found)}."
