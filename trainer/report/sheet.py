"""Panels as one picture: tiles with the outlines of truth and prediction and with the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.report.markup import score
from trainer.report.panels import Panel
from trainer.report.pictures import Choice, Crop, crop_of, has_box, outlines

TILE = 256
"""Side of a tile in pixels."""
COLUMNS = 4
_CAPTION = 18
"""Height of the line below a tile, in pixels."""
_INK, _PAPER, _EMPTY = "#e7eaee", "#14171b", "#000000"
_TRUTH, _PREDICTION, _PROMPT = "#56b4e9", "#ffb000", "#ffffff"
"""As in the report."""


def draw_sheet(panels: Sequence[Panel], title: str, keys: bool = True) -> Image.Image:
    """Draw panels in rows of `COLUMNS`: blue is the truth, orange the prediction, white the prompt.

    Args:
        panels: What is drawn, at least one.
        title: A line above them.
        keys: Whether samples are named.
    """
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * TILE, _CAPTION + rows * (TILE + _CAPTION)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    legend = "truth blue · prediction orange · prompt white"
    _write(draw, (4, 1), f"{title}   {legend}" if columns > 1 else title, columns * TILE - 8, font)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        place = (column * TILE, _CAPTION + row * (TILE + _CAPTION))
        sheet.paste(draw_tile(panel), place)
        words = f"{score(panel.dsc)}  {panel.term}" + (f"  {panel.key}" if keys else "")
        _write(draw, (place[0] + 4, place[1] + TILE + 1), words, TILE - 8, font)
    return sheet


def cropped(image: np.ndarray, crop: Crop, side: int, paper: str) -> Image.Image:
    """A window of an image (H, W) or (H, W, 3), enlarged to a square of `side` pixels on paper of some colour."""
    height, width = image.shape[:2]
    x0, y0 = max(crop.x, 0), max(crop.y, 0)
    x1, y1 = min(crop.x + crop.side, width), min(crop.y + crop.side, height)
    scale = side / crop.side
    part = Image.fromarray(np.ascontiguousarray(image[y0:y1, x0:x1])).convert("RGB")
    size = (max(1, round((x1 - x0) * scale)), max(1, round((y1 - y0) * scale)))
    picture = Image.new("RGB", (side, side), paper)
    corner = (round((x0 - crop.x) * scale), round((y0 - crop.y) * scale))
    picture.paste(part.resize(size, Image.Resampling.BILINEAR), corner)
    return picture


def draw_tile(panel: Panel) -> Image.Image:
    """Draw one panel, cropped as in the report, `TILE` pixels wide and high."""
    crop = crop_of(Choice("", None, panel))
    tile = cropped(panel.image, crop, TILE, _EMPTY)
    draw = ImageDraw.Draw(tile)
    for mask, colour in ((panel.truth, _TRUTH), (panel.prediction, _PREDICTION)):
        _draw_outlines(draw, mask, crop, colour)
    _draw_prompt(draw, panel, crop)
    return tile


def _draw_outlines(draw: ImageDraw.ImageDraw, mask: np.ndarray, crop: Crop, colour: str) -> None:
    coarse = -(-crop.side // (2 * TILE))
    corner = np.array([max(crop.x, 0) - crop.x, max(crop.y, 0) - crop.y])
    for line in outlines(mask, crop, coarse):
        points = (line * coarse + corner) * (TILE / crop.side)
        draw.line([(float(x), float(y)) for x, y in points], fill=colour, width=2)


def _draw_prompt(draw: ImageDraw.ImageDraw, panel: Panel, crop: Crop) -> None:
    scale, corner = TILE / crop.side, np.array([crop.x, crop.y])
    if has_box(panel):
        (x0, y0), (x1, y1) = (panel.box[:2] - corner) * scale, (panel.box[2:] + 1 - corner) * scale
        draw.rectangle((float(x0), float(y0), float(x1), float(y1)), outline=_PROMPT, width=1)
    for point in panel.points:
        x, y = ((point[:2] + 0.5 - corner) * scale).tolist()
        if point[2]:  # on the target
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), outline=_PROMPT, width=2)
        else:
            draw.line((x - 4, y - 4, x + 4, y + 4), fill=_PROMPT, width=2)
            draw.line((x - 4, y + 4, x + 4, y - 4), fill=_PROMPT, width=2)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    words: str,
    width: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """Write a line, cut where it is wider than its place; what the font lacks becomes a question mark."""
    shown = words.encode("latin-1", "replace").decode("latin-1")
    while shown and draw.textlength(shown, font=font) > width:
        shown = shown[:-1]
    draw.text(place, shown, fill=_INK, font=font)
