"""What the page shows of a slice: its picture, the masks as fill and contour, and what they measure.

Shapes: N objects, H W native height and width, h w as shown.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from trainer.callbacks.panels import to_uint8
from trainer.demo.case import Case, Drawn
from trainer.segment.sheet import COLOURS

_LARGEST = 1536
"""Longest side of a picture on the page, in pixels; larger ones are made smaller, for the screen alone."""
_CONTOUR_SIDE = 900
"""Masks of small images are enlarged to about this, so that their contours are thin."""
OPACITY = 0.35
"""Of a mask's fill at the start, and in saved pictures."""


def colour_of(drawn: Drawn) -> str:
    """An object's colour, as ``#rrggbb``."""
    return COLOURS[drawn.colour % len(COLOURS)]


def slice_picture(case: Case, number: int) -> np.ndarray:
    """A slice as the model is shown it: (H, W) or (H, W, 3) uint8."""
    return to_uint8(case.scan.image(number).numpy())


def ratio(case: Case) -> float:
    """Width by height of a slice as it should be seen, with its spacing."""
    height, width = case.scan.size
    spacing = case.spacing
    return width / height if spacing is None else width * spacing[2] / (height * spacing[1])


def painted(masks: np.ndarray, colours: Sequence[str], opacity: float = 1.0) -> tuple[Image.Image, Image.Image]:
    """Masks (N, H, W) bool as pictures (h, w) of their fills and of their contours, clear elsewhere.

    Args:
        masks: Of the objects; those that come later lie above.
        colours: As ``#rrggbb``, one each.
        opacity: Of the fill, 0 to 1.
    """
    height, width = masks.shape[1:]
    times = max(1, round(_CONTOUR_SIDE / max(height, width)))
    shape = (height * times, width * times)
    step = max(1, math.ceil(max(shape) / _LARGEST))
    fill, line = (np.zeros((len(range(0, shape[0], step)), len(range(0, shape[1], step)), 4), np.uint8) for _ in "ab")
    for mask, colour in zip(masks, colours, strict=True):
        if mask.any():
            large = mask.repeat(times, axis=0).repeat(times, axis=1)[::step, ::step]
            red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
            fill[large] = (red, green, blue, round(255 * opacity))
            line[_edge(large, max(1, round(max(large.shape) / 450)))] = (red, green, blue, 255)
    return Image.fromarray(fill, "RGBA"), Image.fromarray(line, "RGBA")


def _edge(mask: np.ndarray, width: int) -> np.ndarray:
    """The outermost pixels of a mask (h, w), so many deep."""
    from scipy.ndimage import binary_erosion

    inner: np.ndarray = binary_erosion(mask, iterations=width, border_value=0)
    return mask & ~inner


def composed(case: Case, number: int) -> Image.Image:
    """A slice with its masks, as a picture to keep: fills and contours as on the page."""
    image = Image.fromarray(slice_picture(case, number)).convert("RGBA")
    masks = case.masks(number)
    fill, line = painted(masks, [colour_of(one) for one in case.scene.objects], OPACITY)
    width, height = max(image.width, fill.width), max(image.height, fill.height)
    size = (
        (round(height * ratio(case)), height) if ratio(case) > width / height else (width, round(width / ratio(case)))
    )
    whole = image.resize(size, Image.Resampling.BICUBIC)
    for part in (fill, line):
        whole.alpha_composite(part.resize(size, Image.Resampling.NEAREST))
    return whole.convert("RGB")


def canvas_value(case: Case | None, tools: Sequence[str]) -> dict[str, Any]:
    """What the canvas of the page is told, as JSON.

    Args:
        case: The image; None shows an invitation.
        tools: What can be drawn: ``box``, ``plus`` and ``minus``; nothing where a model is asked in words.
    """
    if case is None:
        return {"picture": None, "tools": list(tools)}
    number, (height, width) = case.slice, case.scan.size
    masks, value = case.masks(number), {}
    if masks.any():
        fill, line = painted(masks, [colour_of(one) for one in case.scene.objects])
        value = {"fill": _url(fill), "line": _url(line)}
    return {
        "picture": _picture_url(slice_picture(case, number)),
        "width": width,
        "height": height,
        "ratio": ratio(case),
        "slice": number,
        "slices": len(case.scan),
        "tools": list(tools),
        "prompts": [
            {
                "name": one.name,
                "colour": colour_of(one),
                "active": place == case.scene.active,
                "box": one.shown[number].box,
                "points": one.shown[number].points,
            }
            for place, one in enumerate(case.scene.objects)
            if number in one.shown
        ],
        "masked": int(masks.any(axis=0).sum()),
        **value,
    }


def objects_value(case: Case | None) -> dict[str, Any]:
    """What the list of objects is told, as JSON: names, colours and measures."""
    if case is None:
        return {"objects": []}
    rows = [
        {"name": one.name, "colour": colour_of(one), "active": k == case.scene.active, "measure": measured(case, one)}
        for k, one in enumerate(case.scene.objects)
    ]
    return {"objects": rows}


def measured(case: Case, drawn: Drawn) -> str:
    """Area on the slice on show, volume, and the model's own estimate, in words."""
    spacing, here = case.spacing, drawn.answers.get(case.slice)
    if not drawn.answers:
        return "nothing found" if drawn.shown else "not drawn yet"
    parts = []
    if here is not None:
        area = f"{here.area:,} px" if spacing is None else f"{_rounded(here.area * spacing[1] * spacing[2])} mm²"
        parts.append(area if len(case.scan) == 1 else f"{area} here")
    if len(case.scan) > 1:
        count = len(drawn.answers)
        many = f"{count} {'frame' if case.scan.flat else 'slice'}{'' if count == 1 else 's'}"
        volume = "" if spacing is None else f"{_rounded(drawn.voxels * math.prod(spacing) / 1000)} mL in "
        parts.append(f"{volume}{many}")
    if here is not None:
        parts.append(f"{case.score} {here.score:.2f}")
    return " · ".join(parts)


def _rounded(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _picture_url(picture: np.ndarray) -> str:
    image = Image.fromarray(picture)
    if max(image.size) > _LARGEST:
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    return _url(image)


def _url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=3)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
