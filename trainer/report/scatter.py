"""Charts of sizes and of noise: predicted against true, Bland–Altman, and scores over levels, as inline SVG.

Shapes: N objects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from trainer.report.boxes import series_mark, series_style
from trainer.report.charts import Frame, nice_ticks
from trainer.report.markup import MINUS, score

MOST_MARKS = 200
"""Objects of a series as drawn; of more, evenly chosen ones by true size, smallest and largest among them."""

_MARGINS = (62, 14, 16, 40)
_LABEL = 27
"""Height of a line's name and value."""

Points = tuple[Sequence[str], np.ndarray, np.ndarray]
"""What a mark shows when pointed at, predicted sizes (N,) and true ones (N,)."""


def size_scatter(series: Mapping[str, Points], *, unit: str, label: str, numbers: Mapping[str, int]) -> str:
    """Predicted over true sizes, with the line on which both are equal.

    Args:
        series: By model, at least one object each.
        unit: Of the sizes.
        label: What the chart shows, for who does not see it.
        numbers: Of each model which colour and mark it has.

    Returns:
        An ``svg`` element that needs the page's style sheet.
    """
    every = np.concatenate([side for _, *sides in series.values() for side in sides])
    ticks = nice_ticks(0.0, float(every.max()) or 1.0)
    frame = Frame(x=(ticks[0], ticks[-1]), y=(ticks[0], ticks[-1]), width=420, height=360, margins=_MARGINS)
    ends = (ticks[0], ticks[-1])
    equal = f'<path d="{frame.path(ends, ends)}" style="stroke:var(--muted);stroke-dasharray:5 4"/>'
    parts = [
        _marks(frame, numbers[name], names, true, predicted, (predicted, true), f"{name}, ", unit)
        for name, (names, predicted, true) in series.items()
    ]
    grid = frame.grid(ticks, f"predicted ({unit})") + frame.below(ticks, f"true ({unit}); dashed: equal")
    return frame.picture(label, grid, equal, *parts)


def bland_altman(
    points: Points,
    *,
    bias: float,
    limits: tuple[float, float] | None,
    ends: tuple[float, float],
    unit: str,
    label: str,
    number: int,
) -> str:
    """Difference of predicted and true sizes over their mean, with bias and limits of agreement.

    Args:
        points: At least one object.
        bias: Mean difference.
        limits: Limits of agreement; None with one object.
        ends: Least and greatest difference that the axis shows, the same for charts that are compared.
        unit: Of the sizes.
        label: What the chart shows, for who does not see it.
        number: Colour and mark.

    Returns:
        An ``svg`` element that needs the page's style sheet.
    """
    names, predicted, true = points
    means, differences = (predicted + true) / 2, predicted - true
    across = nice_ticks(min(0.0, float(means.min())), float(means.max()) or 1.0, 4)
    up = nice_ticks(*ends, 4)
    frame = Frame(x=(across[0], across[-1]), y=(up[0], up[-1]), width=420, height=300, margins=(62, 14, 78, 40))
    levels = [(bias, "bias", "stroke-width:2")]
    for limit, name in zip(limits or (), ("lower limit", "upper limit"), strict=False):
        levels.append((limit, name, "stroke-dasharray:5 4"))
    none = f'<path d="{frame.path(frame.x, (0.0, 0.0))}" style="stroke:var(--muted)"/>'
    marks = _marks(frame, number, names, means, differences, (predicted, true), "", unit)
    told = f'<g class="dist {series_style(number)}">{_levels(frame, levels)}</g>'
    grid = frame.grid(up, f"predicted {MINUS} true ({unit})") + frame.below(across, f"mean of both ({unit})")
    return frame.picture(label, grid, none, marks, told)


def noise_chart(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[tuple[float, float] | None]]],
    *,
    label: str,
    numbers: Mapping[str, int],
) -> str:
    """Mean DSC over the noise of prompts, a line and a band for each model.

    Args:
        curves: By model: levels in percent, means, and their 95 % confidence intervals; at least one model.
        label: What the chart shows, for who does not see it.
        numbers: Of each model which colour and mark it has.

    Returns:
        An ``svg`` element that needs the page's style sheet.
    """
    every = [
        value for _, means, bands in curves.values() for value in (*means, *(end for b in bands if b for end in b))
    ]
    ticks = [tick for tick in nice_ticks(max(min(every), 0.0), max(every), 4) if tick <= 1.0 + 1e-9]
    levels = sorted({level for found, *_ in curves.values() for level in found})
    frame = Frame(x=(levels[0], levels[-1]), y=(ticks[0], max(ticks[-1], max(every))), margins=(58, 14, 18, 40))
    parts = []
    for name, (found, means, bands) in curves.items():
        kept = [(level, *band) for level, band in zip(found, bands, strict=True) if band]
        outline = [(level, low) for level, low, _ in kept] + [(level, high) for level, _, high in reversed(kept)]
        band = "" if len(kept) < 2 else (
            f'<path d="{frame.path([x for x, _ in outline], [y for _, y in outline])}Z" '
            'style="fill:var(--own);fill-opacity:.13;stroke:none"/>'
        )  # fmt: skip
        dashes = ";stroke-dasharray:6 4" if numbers[name] == 0 else ""
        line = f'<path d="{frame.path(found, means)}" style="stroke-width:2{dashes}"/>'
        dots = "".join(
            f"<g><title>{escape(name)}, {level:g} %: {score(mean)}</title>"
            f"{series_mark(numbers[name], frame.across(level), frame.up(mean))}</g>"
            for level, mean in zip(found, means, strict=True)
        )
        parts.append(f'<g class="dist {series_style(numbers[name])}">{band}{line}{dots}</g>')
    below = frame.below(levels, "noise of the prompt (% of the box's sides)")
    return frame.picture(label, frame.grid(ticks, "mean DSC"), below, *parts)


def series_legend(names: Mapping[str, int]) -> str:
    """Colour, mark and name of every series, for several charts together."""
    items = "".join(
        f'<span class="whole"><svg class="chart" viewBox="0 0 16 12" aria-hidden="true" '
        'style="display:inline-block;width:16px;height:12px;background:none;vertical-align:-1px">'
        f'<g class="dist {series_style(number)}">{series_mark(number, 8, 6)}</g></svg> {escape(name)}</span>'
        for name, number in names.items()
    )
    return f'<p class="legend">{items}</p>'


def _marks(
    frame: Frame,
    number: int,
    names: Sequence[str],
    across: np.ndarray,
    up: np.ndarray,
    sizes: tuple[np.ndarray, np.ndarray],
    who: str,
    unit: str,
) -> str:
    """Marks of a series, each with its case and sizes (predicted, true)."""
    predicted, true = sizes
    order = np.argsort(true, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), MOST_MARKS)).round().astype(int))]
    marks = "".join(
        f"<g><title>{escape(f'{who}{names[at]}: predicted {predicted[at]:.4g}, true {true[at]:.4g} {unit}')}</title>"
        f"{series_mark(number, frame.across(across[at]), frame.up(up[at]))}</g>"
        for at in chosen.tolist()
    )
    return f'<g class="dist {series_style(number)}" style="fill-opacity:.6">{marks}</g>'


def _levels(frame: Frame, levels: Sequence[tuple[float, str, str]]) -> str:
    """Horizontal lines with their names and values at the right, which stay apart where the lines do not."""
    right, parts, free = frame.width - frame.margins[2], [], -math.inf
    for value, name, style in sorted(levels, reverse=True):
        y = frame.up(value)
        free = max(y, free + _LABEL)
        shown = f"{abs(value):,.0f}" if abs(value) >= 999.5 else f"{abs(value):.3g}"
        sign = MINUS if value < 0 else "+"
        parts.append(
            f'<path d="M{frame.margins[0]} {y:.1f}H{right}" style="stroke:var(--own);{style}"/>'
            f'<text x="{right + 5}" y="{free - 3:.1f}">{name}</text>'
            f'<text class="axis" x="{right + 5}" y="{free + 10:.1f}">{sign}{shown}</text>'
        )
    return "".join(parts)
