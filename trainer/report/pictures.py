"""Panels as pictures: the image with outlines of truth, prediction and box, and with the points of the prompt.

The image is pixels; the outlines are vectors in its coordinates, (0, 0) being the image's upper left corner.
Shapes: H, W are an image's height and width in pixels.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
SAME = 0.001
"""Difference of DSC up to which a picture is taken for the target of a table's row."""


@dataclass(frozen=True)
class Choice:
    """A target to show.

    Attributes:
        why: Why this one.
        before: The panel before tuning, or None.
        after: The panel after tuning, or None.
        rank: Its place by DSC among all targets that were scored, the worst being 1, and their number; None where the
            panel does not say which target it is.
    """

    why: str
    before: Panel | None
    after: Panel | None
    rank: tuple[int, int] | None = None

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
    """Choose worst, quartiles and best by DSC after tuning, and the target that gained least.

    Best, median and worst of all targets are among them where they were kept; they may lack the picture before tuning.
    """
    last_one = data.after or data.before
    ranks = _ranks(last_one)
    before, after = _by_target(data.before), _by_target(data.after)
    count = len(last_one.scores) if last_one else 0
    middle = (count + 1) // 2
    found = []
    for place, panel in (after or before).items():
        rank = ranks.get((panel.key, panel.target))
        if rank and abs(rank[1] - panel.dsc) > SAME:  # a file of another evaluation
            rank = None
        both = place in before and place in after
        if both or not (before and after) or (rank and rank[0] in (1, middle, count)):
            known = (rank[0], count) if rank else None
            found.append(Choice("", before.get(place), after.get(place), known))
    if not any(choice.before and choice.after for choice in found) and before and after:
        found = [Choice("", None, panel) for panel in after.values()]
    ranked = sorted(found, key=lambda choice: (choice.panel.dsc, choice.rank or (0, 0)))
    if not ranked:
        return []
    wanted = _wanted(ranked, middle)
    return [replace(ranked[place], why=wanted[place]) for place in sorted(wanted)]


def _wanted(ranked: Sequence[Choice], middle: int) -> dict[int, str]:
    """Which of some targets, from worst to best, are shown, and why."""
    last = len(ranked) - 1
    wanted = {last: "Best", 0: "Worst"} if last else {0: "The only one"}
    medians = [place for place, choice in enumerate(ranked) if choice.rank and choice.rank[0] == middle]
    wanted.setdefault((medians or [round(0.5 * last)])[0], "Median")
    for share, why in ((0.25, "Lower quartile"), (0.75, "Upper quartile")):
        wanted.setdefault(round(share * last), why)
    pairs = [(place, one.before, one.after) for place, one in enumerate(ranked)]
    gains = [(after.dsc - before.dsc, place) for place, before, after in pairs if before and after]
    if gains:
        least, place = min(gains)
        wanted.setdefault(place, "Least gained" if least >= 0 else "Fell most")
    for place in np.linspace(0, last, SHOWN * 2 - 1).round().astype(int):
        if len(wanted) < SHOWN:
            wanted.setdefault(int(place), "Between")
    return wanted


def _ranks(evaluation: Evaluation | None) -> dict[tuple[str, int], tuple[int, float]]:
    """Place by DSC, the worst being 1, and DSC of every target of an evaluation."""
    rows = sorted(evaluation.scores, key=lambda row: row.dsc) if evaluation else []
    return {(row.key, row.target): (place, row.dsc) for place, row in enumerate(rows, 1)}


def label_of(choice: Choice) -> str:
    """Why a target is shown, and its place among all: ``Worst`` is said alone only of the worst of all."""
    if choice.rank is None:
        return choice.why
    place, count = choice.rank
    true = {"Worst": place == 1, "Best": place == count, "Median": place == (count + 1) // 2}
    why = choice.why if true.get(choice.why, True) else f"{choice.why} of those kept"
    if count < 2:
        return why
    return f"{why}, {ordinal(count + 1 - place)} of {count:,}"


def ordinal(number: int) -> str:
    """``1st``, ``2nd``, ``3rd``, ``4th``, ``11th``."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending}"


def crop_of(choice: Choice) -> Crop:
    """A square around prompt and truth with a margin, wider where a prediction reaches out; or the whole image."""
    panel = choice.panel
    height, width = panel.truth.shape
    x0, y0, x1, y1 = _extent(panel.truth, panel)
    outer = [_extent(side.prediction, panel) for side in (choice.before, choice.after) if side]
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


def _extent(mask: np.ndarray, panel: Panel) -> tuple[float, float, float, float]:
    """The smallest box (x0, y0, x1, y1) around a mask and the panel's prompt; the whole image without either."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    xs, ys = [*panel.points[:, 0], *columns[:1], *columns[-1:]], [*panel.points[:, 1], *rows[:1], *rows[-1:]]
    if has_box(panel):
        xs, ys = [*xs, *panel.box[::2]], [*ys, *panel.box[1::2]]
    if not xs:
        return 0.0, 0.0, width - 1.0, height - 1.0
    return float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))


def has_box(panel: Panel) -> bool:
    """Whether a box is part of the prompt."""
    return bool(np.isfinite(panel.box).all())


def draw(choice: Choice, number: int) -> str:
    """A figure with the target before and after; the image is stored once.

    Args:
        choice: The target.
        number: Unique on the page.
    """
    panel, crop = choice.panel, crop_of(choice)
    sides = [
        (name, f"{name} tuning", side) for name, side in (("before", choice.before), ("after", choice.after)) if side
    ]
    height, width = panel.truth.shape
    close = "" if crop.side >= max(height, width) else f", cropped to {crop.side} × {crop.side}"
    return (
        f'<figure class="panel"><div class="tiles">{tiles(sides, crop, number)}</div>'
        f"<figcaption><b>{escape(label_of(choice))}</b> · "
        f"{escape(panel.term)}<br><small>{escape(panel.key)} · {width} × {height} px{close}</small>"
        "</figcaption></figure>"
    )


def tiles(sides: Sequence[tuple[str, str, Panel]], crop: Crop, number: int) -> str:
    """One target as several predictions see it, side by side; the image is stored once.

    Args:
        sides: What stands below a tile, what it is called in its description, and its panel: the same image and truth.
        crop: The part that is seen.
        number: Unique on the page.
    """
    _, _, panel = sides[0]
    image = f'<g id="target-{number}">{_image(panel, crop)}{_outline(panel.truth, crop, "truth")}</g>'
    drawn = []
    for position, (name, when, side) in enumerate(sides):
        base = f'<use href="#target-{number}"/>' if position else image
        label = f"{panel.term} {when}: the prediction overlaps the truth with a DSC of {score(side.dsc)}"
        parts = base + _outline(side.prediction, crop, "prediction") + _prompt(side, crop)
        view = f"{crop.x} {crop.y} {crop.side} {crop.side}"
        drawn.append(
            f'<div class="tile"><svg viewBox="{view}" role="img" aria-label="{escape(label)}">{parts}</svg>'
            f"<p>{escape(name)} <b>{score(side.dsc)}</b></p></div>"
        )
    return "".join(drawn)


def _by_target(evaluation: Evaluation | None) -> dict[tuple[str, str, int], Panel]:
    """Panels by key, term and target; in files that do not say the target, by its number among the same."""
    places: dict[tuple[str, str, int], Panel] = {}
    for panel in evaluation.panels if evaluation else ():
        if panel.target >= 0:
            places[panel.key, panel.term, panel.target] = panel
            continue
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
    lines = outlines(mask, crop, coarse)
    while len(drawn := "".join(_path(line) for line in lines)) > MOST_TEXT:
        coarse *= 2
        lines = outlines(mask, crop, coarse)
    if not drawn:
        return ""
    half, x0, y0 = coarse / 2, max(crop.x, 0), max(crop.y, 0)
    return f'<path class="{kind}" transform="translate({x0:g} {y0:g}) scale({half:g})" d="{drawn}"/>'


def outlines(mask: np.ndarray, crop: Crop, coarse: int) -> list[np.ndarray]:
    """Closed lines around the pieces of a mask within a crop.

    Args:
        mask: (H, W), nonzero inside.
        crop: The part that is looked at.
        coarse: Every so many pixels are looked at.

    Returns:
        Lines (N, 2) as (x, y) in steps of `coarse` pixels, from the crop's part of the image's upper left corner;
        multiples of one half.
    """
    x0, y0 = max(crop.x, 0), max(crop.y, 0)
    part = mask[y0 : crop.y + crop.side : coarse, x0 : crop.x + crop.side : coarse] != 0
    if not part.any():
        return []
    # the margin of background closes outlines at the border
    lines = contour_generator(z=np.pad(part, 1).astype(np.float32)).lines(0.5)
    return [np.asarray(line) - 0.5 for line in lines]


def _path(points: np.ndarray) -> str:
    """A closed line (N, 2) as relative moves in half pixels; moves on in the same direction are joined."""
    doubled = np.rint(points * 2).astype(int)  # whole numbers, short to write
    moves = [[int(x), int(y)] for x, y in np.diff(doubled, axis=0)]
    joined: list[list[int]] = []
    for x, y in moves:
        if joined and joined[-1][0] * y == joined[-1][1] * x and joined[-1][0] * x + joined[-1][1] * y > 0:
            joined[-1] = [joined[-1][0] + x, joined[-1][1] + y]
        else:
            joined.append([x, y])
    start = f"M{doubled[0][0]} {doubled[0][1]}"
    return start + "l" + " ".join(f"{x} {y}" for x, y in joined).replace(" -", "-") + "z"


def _prompt(panel: Panel, crop: Crop) -> str:
    """The prompt: its box, a circle on every point of the target and a cross on every point beside it."""
    parts = []
    if has_box(panel):
        x0, y0, x1, y1 = (float(edge) for edge in panel.box)
        size = f'width="{x1 - x0 + 1:.1f}" height="{y1 - y0 + 1:.1f}"'
        parts.append(f'<rect class="prompt" x="{x0:.1f}" y="{y0:.1f}" {size}/>')
    reach = crop.side / 60
    for x, y, label in panel.points.tolist():
        x, y = x + 0.5, y + 0.5  # a pixel's middle
        if label:
            parts.append(f'<circle class="prompt point" cx="{x:.1f}" cy="{y:.1f}" r="{reach:.2f}"/>')
        else:
            arms = f"m{-reach:.2f} {-reach:.2f}l{2 * reach:.2f} {2 * reach:.2f}m0 {-2 * reach:.2f}"
            cross = f"M{x:.1f} {y:.1f}{arms}l{-2 * reach:.2f} {2 * reach:.2f}"
            parts.append(f'<path class="prompt point" d="{cross}"/>')
    return "".join(parts)
