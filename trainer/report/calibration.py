"""Calibration: whether what a model promises comes true, as a section of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from data_shards.errors import counted
from trainer.report.charts import Frame
from trainer.report.data import RunData
from trainer.report.markup import paragraph, score, section
from trainer.report.reliability import Calibration, Reliability

_TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_SURE = 0.9
"""The promise that is put into words."""
_RARE = 1e-4
"""Share of the pixels below which a bin is not put into words."""


def calibration_section(data: RunData) -> str:
    """Reliability diagrams before and after tuning; nothing where none was recorded."""
    sides = {"before": data.before, "after": data.after}
    known = {name: one.calibration for name, one in sides.items() if one and one.calibration}
    if not known:
        return ""
    pixels = {name: one.pixels for name, one in known.items()}
    ious = {name: one.ious for name, one in known.items() if one.ious}
    charts = [f"<figure><h3>Pixels</h3>{reliability_chart(pixels, *_PIXELS)}</figure>"]
    if ious:
        charts.append(f"<figure><h3>The model's own estimate of its IoU</h3>{reliability_chart(ious, *_IOUS)}</figure>")
    said = "".join(paragraph(in_words(name, one)) for name, one in known.items())
    lines = {"before": "grey, dashed: before tuning", "after": "blue: after tuning"}
    legend = "; ".join(lines[name] for name in known)
    last = list(known.values())[-1]
    where = (
        "All pixels of the images count, because nothing tells a model that is asked in words where to look."
        if last.whole
        else "The pixels in each target's box count, a little enlarged: the far background is right for any model."
    )
    note = (
        f"{legend[0].upper()}{legend[1:]}. On the dotted line a promise comes true as often as it says; below it "
        f"fewer pixels are inside than the model promises, above it more. Larger circles stand for more. {where} Of "
        f"{counted(last.targets, 'target')}, each of which weighs as much as any other."
    )
    return section(
        "Can its probabilities be believed?",
        said,
        f'<div class="charts">{"".join(charts)}</div>',
        paragraph(note, "note"),
        key="calibration",
    )


_PIXELS = ("probability of being inside, by the model", "share really inside", "pixels")
_IOUS = ("IoU that the model expects", "IoU measured", "targets")


def in_words(name: str, one: Calibration) -> str:
    """What a clinician can take from it.

    Args:
        name: ``before`` or ``after``.
        one: What was found then.
    """
    likely = [
        (abs(promised - _SURE), promised, found)
        for share, promised, found in zip(one.pixels.share, one.pixels.promised, one.pixels.found, strict=True)
        if share >= _RARE and 0.5 <= promised < 0.99
    ]
    words = f"{name.title()} tuning: "
    if likely:
        _, promised, found = min(likely)
        words += f"where the model says {_percent(promised)}, {_percent(found)} of the pixels are inside. "
    words += (
        f"On average its probabilities are off by {100 * one.ece:.1f} percentage points (ECE {one.ece:.3f}; "
        f"Brier score {one.brier:.3f}, 0 being perfect)."
    )
    if one.iou_error is not None:
        words += f" Its own estimate of the IoU is off by {score(one.iou_error)} on average."
    return words


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def reliability_chart(curves: Mapping[str, Reliability], promised: str, found: str, what: str) -> str:
    """What came true over what was promised, a line for each evaluation.

    Args:
        curves: By ``before`` and ``after``, at least one of them.
        promised: Name of the one axis.
        found: Name of the other.
        what: What is counted.
    """
    frame = Frame(x=(0, 1), y=(0, 1), width=420, height=400)
    lines, words = [], []
    for name, one in curves.items():
        dots = "".join(
            f'<circle cx="{frame.across(x):.1f}" cy="{frame.up(y):.1f}" r="{2.5 + 5 * math.sqrt(share):.1f}">'
            f"<title>{name} tuning: promised {x:.2f}, came true {y:.2f}, {share:.1%} of the {what}</title></circle>"
            for share, x, y in zip(one.share, one.promised, one.found, strict=True)
        )
        lines.append(f'<g class="jitter {name}"><path d="{frame.path(one.promised, one.found)}"/>{dots}</g>')
        words.append(f"{name} tuning {_ends(one)}")
    (x0, x1), (y0, y1) = ((place(0.0), place(1.0)) for place in (frame.across, frame.up))
    style = 'class="grid" stroke-dasharray="2 4" style="stroke:var(--ink)"'
    diagonal = f'<line {style} x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'
    return frame.picture(
        escape(f"share of {what} for which it came true, by what was promised: {'; '.join(words)}", quote=False),
        frame.grid(_TICKS, found),
        frame.below(_TICKS, promised),
        diagonal,
        *lines,
    )


def _ends(one: Reliability) -> str:
    """First and last point in words, for who does not see the chart."""
    points = list(zip(one.promised, one.found, strict=True))
    return " to ".join(f"{y:.2f} at {x:.2f}" for x, y in (points[0], points[-1]))
