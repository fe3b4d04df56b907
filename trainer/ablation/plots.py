"""Plots of an ablation, as inline SVG in the look of the reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trainer.report.charts import Frame, nice_ticks
from trainer.report.markup import score, signed

_LETTER = 7.2
"""Width of a letter of a label, about."""
_LINE = 15
"""Height of one."""
NOTHING = " (nothing learns)"
"""What is said after the name of untouched weights."""
_ACCENT, _OTHER, _BAD = "var(--accent)", "var(--before)", "var(--bad)"


@dataclass(frozen=True)
class Point:
    """A cell in the plot of score against cost.

    Attributes:
        name: The cell.
        cost: Above 0.
        said: The cost in words.
        value: Mean score.
        low: Lower end of its interval.
        high: Upper end.
        specialist: Whether it is a model of another kind: drawn as a diamond, and no part of the front.
    """

    name: str
    cost: float
    said: str
    value: float
    low: float | None = None
    high: float | None = None
    specialist: bool = False


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats, costing no more and scoring no less, by rising cost (the Pareto front)."""

    def beaten(one: Point) -> bool:
        return any(
            other.cost <= one.cost and other.value >= one.value and (other.cost, other.value) != (one.cost, one.value)
            for other in points
        )

    return sorted((one for one in points if not beaten(one)), key=lambda one: (one.cost, one.value))


def pareto_plot(
    points: Sequence[Point], cost: str, metric: str, *, logarithmic: bool, level: tuple[str, float] | None = None
) -> str:
    """Score against cost, with the front of those that no other beats.

    Args:
        points: The cells, at least one.
        cost: Name of the cost.
        metric: Name of the score.
        logarithmic: Whether the axis of costs is.
        level: Name and score of what costs nothing, drawn as a line across.
    """
    ticks = _levels(points, level)
    marks = _decades(points) if logarithmic else nice_ticks(min(p.cost for p in points), max(p.cost for p in points), 4)
    place = math.log10 if logarithmic else float
    low = place(min(marks[0], *(one.cost for one in points)))
    high = place(max(marks[-1], *(one.cost for one in points)))
    room = 0.06 * (high - low or 1.0)
    frame = Frame(x=(low - room, high + room), y=(ticks[0], ticks[-1]), height=330)
    best = front([one for one in points if not one.specialist])
    bottom = frame.up(ticks[0]) - 9
    spots = [(frame.across(place(one.cost)), min(frame.up(one.value), bottom)) for one in points]
    names = [f"{one.name} ↓ {score(one.value)}" if one.value < ticks[0] else one.name for one in points]
    drawn = [_stairs([spots[points.index(one)] for one in best])]
    if level:
        drawn.append(_level(frame, *level))
    drawn += [_point(frame, one, spot, one in best) for one, spot in zip(points, spots, strict=True)]
    drawn += _labels(names, spots, frame, level)
    words = "; ".join(f"{one.name}: {score(one.value)} at {one.said}" for one in points)
    axis = frame.below([], cost) + "".join(
        f'<text x="{frame.across(place(mark)):.1f}" y="{frame.height - 23}" text-anchor="middle">{_short(mark)}</text>'
        for mark in marks
    )
    return frame.picture(f"{metric} against {cost}: {words}", frame.grid(ticks, metric), axis, *drawn)


def _levels(points: Sequence[Point], level: tuple[str, float] | None) -> list[float]:
    """Ticks of the score; a specialist far below the others does not press them together, and stands at the bottom."""
    plain = [one for one in points if not one.specialist] or list(points)
    ends = [end for one in plain for end in (one.value, one.low, one.high) if end is not None]
    ends += [level[1]] if level else []
    floor = min(ends) - (max(ends) - min(ends))
    ends += [end for one in points if one.value >= floor for end in (one.low, one.high) if end is not None]
    return nice_ticks(min(ends), max(ends), 4)


def _decades(points: Sequence[Point]) -> list[float]:
    """Powers of ten around the costs; over few decades 1, 2 and 5 of each."""
    least, most = min(one.cost for one in points), max(one.cost for one in points)
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    fine = [factor * 10.0**power for power in decades for factor in ((1, 2, 5) if len(decades) < 4 else (1,))]
    inside = [mark for mark in fine if least / 1.5 <= mark <= most * 1.5]
    return inside if len(inside) > 1 else [10.0 ** decades[0], 10.0 ** (decades[-1] + (len(decades) == 1))]


def _short(value: float) -> str:
    """A number in few letters, such as 20k and 5M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def _stairs(spots: Sequence[tuple[float, float]]) -> str:
    """The front: flat to the next cost, then up."""
    if len(spots) < 2:
        return ""
    path = f"M{spots[0][0]:.1f} {spots[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in spots[1:])
    return f'<path d="{path}" style="stroke:{_ACCENT};stroke-width:1.5;stroke-dasharray:4 4;stroke-opacity:.7"/>'


def _level(frame: Frame, name: str, value: float) -> str:
    left, right, y = frame.margins[0], frame.width - frame.margins[2], frame.up(value)
    return (
        f'<g><title>{escape(name)}: {score(value)}</title><path d="M{left} {y:.1f}H{right}" '
        f'style="stroke:{_OTHER};stroke-width:1.5;stroke-dasharray:2 4"/>'
        f'<text x="{right}" y="{y - 5:.1f}" text-anchor="end">{escape(name + NOTHING)}</text></g>'
    )


def _point(frame: Frame, one: Point, spot: tuple[float, float], best: bool) -> str:
    x, y = spot
    colour = _ACCENT if best else _OTHER
    tip = f"{one.name}: {score(one.value)} at {one.said}"
    whisker = ""
    if one.low is not None and one.high is not None:
        tip += f" (95 % interval {score(one.low)} to {score(one.high)})"
    if one.low is not None and one.high is not None and one.low >= frame.y[0]:
        path = f"M{x:.1f} {frame.up(one.low):.1f}V{frame.up(one.high):.1f}"
        whisker = f'<path d="{path}" style="stroke:{colour};stroke-opacity:.45;stroke-width:2"/>'
    fill = colour if best else "var(--paper)"
    style = f'style="fill:{fill};stroke:{colour};stroke-width:2"'
    dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {style}/>'
    if one.specialist:
        dot = f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6-6z" {style}/>'
    return f"<g><title>{escape(tip)}</title>{whisker}{dot}</g>"


def _labels(
    names: Sequence[str], spots: Sequence[tuple[float, float]], frame: Frame, level: tuple[str, float] | None
) -> list[str]:
    """Names beside their points, moved up or down where they would lie on a point, on each other or on the level's."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    if level:
        right, y = frame.width - frame.margins[2], frame.up(level[1])
        taken.append((right - _LETTER * len(level[0] + NOTHING), y - 18, right, y))
    drawn = []
    for name, (x, y) in zip(names, spots, strict=True):
        width = _LETTER * len(name)
        left = x + 10 + width > frame.width - 4
        start = x - 10 - width if left else x + 10
        offsets = (0, *(step * sign for step in range(_LINE, 6 * _LINE, 5) for sign in (-1, 1)))
        boxes = [(start, y + off - 9, start + width, y + off + 5) for off in offsets]
        inside = [box for box in boxes if box[1] > 0 and box[3] < frame.height - frame.margins[3]]
        free = [box for box in inside if not any(_touch(box, other) for other in taken)]
        box = (free or inside or boxes)[0]
        taken.append(box)
        drawn.append(f'<text class="axis" x="{box[0]:.1f}" y="{box[1] + 13:.1f}">{escape(name)}</text>')
    return drawn


def _touch(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def forest_plot(
    rows: Sequence[tuple[str, float, float | None, float | None, str]],
    metric: str,
    reference: str,
    aside: Sequence[str] = (),
) -> str:
    """Differences from the reference with their intervals, a line for each cell.

    Args:
        rows: Name, mean difference, ends of its interval, and a sign where it is beyond chance; at least one.
        metric: Name of the score.
        reference: What is compared with.
        aside: Names of those that the axis is not stretched for; what lies beyond it is an arrow with its number.
    """
    low, high = _reach(rows, aside)
    ticks = nice_ticks(low, high, 4)
    room = round(min(160, _LETTER * max(len(name) for name, *_ in rows) + 12))
    frame = Frame(
        *((ticks[0], ticks[-1]), (0.0, float(len(rows)))),
        height=34 * len(rows) + 64,
        margins=(room, 10, 20, 44),
    )
    zero, bottom = frame.across(0.0), frame.height - frame.margins[3]
    drawn = [f'<path d="M{zero:.1f} {frame.margins[1]}V{bottom}" style="stroke:{_OTHER};stroke-dasharray:3 3"/>']
    for number, (name, value, least, most, sign) in enumerate(rows):
        y = frame.up(len(rows) - number - 0.5)
        colour = (_BAD if value < 0 else _ACCENT) if sign else _OTHER
        tip = f"{name}: {signed(value)}"
        if least is not None and most is not None:
            tip += f" ({signed(least)} to {signed(most)})"
            ends = [frame.across(min(max(end, ticks[0]), ticks[-1])) for end in (least, most)]
            drawn.append(f'<path d="M{ends[0]:.1f} {y:.1f}H{ends[1]:.1f}" style="stroke:{colour};stroke-width:2.5"/>')
        dot = f'<circle cx="{frame.across(value):.1f}" cy="{y:.1f}" r="5" style="fill:{colour}"/>'
        if not ticks[0] <= value <= ticks[-1]:
            dot = _beyond(frame, value, y, colour)
        drawn.append(
            f"<g><title>{escape(tip)}</title>{dot}</g>"
            f'<text class="axis" x="{room - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(name + sign)}</text>'
        )
    said = "; ".join(f"{name} {signed(value)}" for name, value, *_ in rows)
    below = frame.below(ticks, f"mean difference of {metric} from {reference}")
    return frame.picture(f"mean difference of {metric} from {reference}: {said}", below, *drawn)


def _reach(
    rows: Sequence[tuple[str, float, float | None, float | None, str]], aside: Sequence[str]
) -> tuple[float, float]:
    """Ends of the axis: 0, and all intervals but of those aside that lie much further out than the others."""
    ends = {name: [end for end in values if end is not None] for name, *values, _ in rows}
    near = [end for name, found in ends.items() if name not in aside for end in found]
    if near:
        far = 2.5 * max(abs(end) for end in near)
        near += [end for found in ends.values() if all(abs(one) <= far for one in found) for end in found]
    else:
        near = [end for found in ends.values() for end in found]
    return min(*near, 0.0), max(*near, 0.0)


def _beyond(frame: Frame, value: float, y: float, colour: str) -> str:
    """An arrow at the edge that a value lies beyond, with the value."""
    left = value < frame.x[0]
    x, way = frame.across(frame.x[0] if left else frame.x[1]), 1 if left else -1
    arrow = f'<path d="M{x + 9 * way:.1f} {y - 5:.1f}l{-9 * way} 5l{9 * way} 5z" style="fill:{colour}"/>'
    anchor = "start" if left else "end"
    return f'{arrow}<text x="{x + 15 * way:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{signed(value)}</text>'
