"""Panels as pictures: the image with outlines of truth, prediction and box.

The image is pixels; the outlines are vectors in its coordinates, (0, 0) being the image's upper left corner.
Shapes: H, W are an image's height and width in pixels.
"""

from __future__ import annotations

import base64
import io
import itertools
from dataclasses import dataclass
from html import escape

import numpy as np
from contourpy import contour_generator
from PIL import Image

from trainer.report.data import Evaluation, RunData
from trainer.report.markup import score
from trainer.report.panels import Panel

SIDE = 480
"""Longest side of a picture in pixels; larger ones are made smaller."""
MOST_TEXT = 60_000
"""Characters of an outline; one that needs more is drawn coarser, so that the page stays light."""
SHOWN = 6


@dataclass(frozen=True)
class Choice:
    """A target to show.

    Attributes:
        why: Why this one.
        before: The panel before tuning, or None.
        after: The panel after tuning, or None.
    """

    why: str
    before: Panel | None
    after: Panel | None

    @property
    def panel(self) -> Panel:
        """The one that it is chosen by."""
        panel = self.after or self.before
        assert panel is not None
        return panel


@dataclass(frozen=True)
class Crop:
    """A square view (x, y, side) in native pixels; it may reach beyond a narrow image."""

    x: int
    y: int
    side: int


def choose(data: RunData) -> list[Choice]:
    """Choose worst, quartiles and best by DSC after tuning, and the target that gained least."""
    before, after = _by_target(data.before), _by_target(data.after)
    places = [place for place in after if place in before] or list(after or before)
    pairs = [(before.get(place), after.get(place)) for place in places]
    ranked = sorted((Choice("", *pair) for pair in pairs), key=lambda choice: choice.panel.dsc)
    if not ranked:
        return []
    last = len(ranked) - 1
    wanted = {last: "Best", 0: "Worst"} if last else {0: "The only one"}
    for share, why in ((0.5, "Median"), (0.25, "Lower quartile"), (0.75, "Upper quartile")):
        wanted.setdefault(round(share * last), why)
    gains = [choice.after.dsc - choice.before.dsc for choice in ranked if choice.after and choice.before]
    if gains:
        wanted.setdefault(int(np.argmin(gains)), "Least gained" if min(gains) >= 0 else "Fell most")
    for place in np.linspace(0, last, SHOWN * 2 - 1).round().astype(int):
        if len(wanted) < SHOWN:
            wanted.setdefault(int(place), "Between")
    return [Choice(wanted[place], ranked[place].before, ranked[place].after) for place in sorted(wanted)]


def crop_of(choice: Choice) -> Crop:
    """A square around box and truth with a margin, wider where a prediction reaches out; or the whole image."""
    panel = choice.panel
    height, width = panel.truth.shape
    x0, y0, x1, y1 = _extent(panel.truth, panel.box)
    masks = [side.prediction for side in (choice.before, choice.after) if side]
    outer = [_extent(mask, panel.box) for mask in masks]
    centre_x, centre_y = (x0 + x1) / 2, (y0 + y1) / 2
    reach = max(abs(edge - centre) for e in outer for edge, centre in zip(e, (centre_x, centre_y) * 2, strict=True))
    longest = max(x1 - x0, y1 - y0) + 1
    side = round(max(1.35 * longest, min(2.1 * reach, 2 * longest), 48))
    if side >= 0.9 * max(height, width):
        side = max(height, width)
    start = [
        round(min(max(centre + 0.5 - side / 2, 0), size - side)) if size > side else round((size - side) / 2)
        for centre, size in ((centre_x, width), (centre_y, height))
    ]
    return Crop(start[0], start[1], side)


def _extent(mask: np.ndarray, box: np.ndarray) -> tuple[float, float, float, float]:
    """The smallest box (x0, y0, x1, y1) around a mask and a box."""
    x0, y0, x1, y1 = (float(edge) for edge in box)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return x0, y0, x1, y1
    return min(x0, columns[0]), min(y0, rows[0]), max(x1, columns[-1]), max(y1, rows[-1])


def draw(choice: Choice, number: int) -> str:
    """A figure with the target before and after; the image is stored once.

    Args:
        choice: The target.
        number: Unique on the page.
    """
    panel, crop = choice.panel, crop_of(choice)
    sides = [(name, side) for name, side in (("before", choice.before), ("after", choice.after)) if side]
    image = f'<g id="target-{number}">{_image(panel, crop)}{_outline(panel.truth, crop, "truth")}</g>'
    tiles = []
    for position, (name, side) in enumerate(sides):
        base = f'<use href="#target-{number}"/>' if position else image
        label = f"{panel.term} {name} tuning: the prediction overlaps the truth with a DSC of {score(side.dsc)}"
        parts = base + _outline(side.prediction, crop, "prediction") + _box(side.box)
        view = f"{crop.x} {crop.y} {crop.side} {crop.side}"
        tiles.append(
            f'<div class="tile"><svg viewBox="{view}" role="img" aria-label="{escape(label)}">{parts}</svg>'
            f"<p>{name} <b>{score(side.dsc)}</b></p></div>"
        )
    height, width = panel.truth.shape
    close = "" if crop.side >= max(height, width) else f", cropped to {crop.side} × {crop.side}"
    return (
        f'<figure class="panel"><div class="tiles">{"".join(tiles)}</div><figcaption><b>{escape(choice.why)}</b> · '
        f"{escape(panel.term)}<br><small>{escape(panel.key)} · {width} × {height} px{close}</small>"
        "</figcaption></figure>"
    )


def _by_target(evaluation: Evaluation | None) -> dict[tuple[str, str, int], Panel]:
    """Panels by key, term, and number among the same: panels do not say which target they are."""
    places: dict[tuple[str, str, int], Panel] = {}
    for panel in evaluation.panels if evaluation else ():
        number = next(n for n in itertools.count() if (panel.key, panel.term, n) not in places)
        places[panel.key, panel.term, number] = panel
    return places


def _image(panel: Panel, crop: Crop) -> str:
    """The part of the image that is seen, as a PNG or JPEG inside the page, whichever is smaller."""
    height, width = panel.truth.shape
    x0, y0 = max(crop.x, 0), max(crop.y, 0)
    x1, y1 = min(crop.x + crop.side, width), min(crop.y + crop.side, height)
    picture = Image.fromarray(np.ascontiguousarray(panel.image[y0:y1, x0:x1]))
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        picture.save(buffer, format=kind, **options)
        encoded[kind] = buffer.getvalue()
    # a PNG shows what the model saw; a JPEG only where that would make the page heavy
    kind = "png" if len(encoded["png"]) < 64_000 else min(encoded, key=lambda kind: len(encoded[kind]))
    content = base64.b64encode(encoded[kind]).decode("ascii")
    place = f'x="{x0}" y="{y0}" width="{x1 - x0}" height="{y1 - y0}" preserveAspectRatio="none"'
    return f'<image {place} href="data:image/{kind};base64,{content}"/>'


def _outline(mask: np.ndarray, crop: Crop, kind: str) -> str:
    """A mask's outline within the crop, as a path; coarser for a large crop or a mask of very many pieces."""
    coarse = -(-crop.side // (2 * SIDE))  # every n-th pixel
    x0, y0 = max(crop.x, 0), max(crop.y, 0)
    part = mask[y0 : crop.y + crop.side, x0 : crop.x + crop.side] != 0
    drawn = _trace(part[::coarse, ::coarse])
    while len(drawn) > MOST_TEXT:
        coarse *= 2
        drawn = _trace(part[::coarse, ::coarse])
    if not drawn:
        return ""
    half = coarse / 2
    return f'<path class="{kind}" transform="translate({x0 - half:g} {y0 - half:g}) scale({half:g})" d="{drawn}"/>'


def _trace(mask: np.ndarray) -> str:
    """Outlines of a mask (H, W) with a margin of one pixel, in half pixels: these are whole numbers, short to write."""
    if not mask.any():
        return ""
    # the margin of background closes outlines at the border
    lines = contour_generator(z=np.pad(mask, 1).astype(np.float32)).lines(0.5)
    return "".join(_path(np.asarray(line)) for line in lines)


def _path(points: np.ndarray) -> str:
    """A closed line (N, 2) as relative moves in half pixels; moves on in the same direction are joined."""
    doubled = np.rint(points * 2).astype(int)
    moves = [[int(x), int(y)] for x, y in np.diff(doubled, axis=0)]
    joined: list[list[int]] = []
    for x, y in moves:
        if joined and joined[-1][0] * y == joined[-1][1] * x and joined[-1][0] * x + joined[-1][1] * y > 0:
            joined[-1] = [joined[-1][0] + x, joined[-1][1] + y]
        else:
            joined.append([x, y])
    start = f"M{doubled[0][0]} {doubled[0][1]}"
    return start + "l" + " ".join(f"{x} {y}" for x, y in joined).replace(" -", "-") + "z"


def _box(box: np.ndarray) -> str:
    x0, y0, x1, y1 = (float(edge) for edge in box)
    size = f'width="{x1 - x0 + 1:.1f}" height="{y1 - y0 + 1:.1f}"'
    return f'<rect class="prompt" x="{x0:.1f}" y="{y0:.1f}" {size}/>'
