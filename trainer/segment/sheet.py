"""Slices of a volume as one picture: the outlines of its objects, each in a colour of its own.

Shapes: N objects, H W native height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.report.pictures import Crop, outlines
from trainer.report.sheet import COLUMNS, TILE, cropped
from trainer.volumes.asked import Asked, tight_box

MOST_TILES = 12
_CAPTION = 18
"""Height of a line of text in pixels."""
_INK, _PAPER, _TRUTH = "#e7eaee", "#14171b", "#ffffff"
COLOURS = ("#ffb000", "#56b4e9", "#2fc99a", "#e28fc0", "#f0e442", "#ff7043", "#b39ddb", "#8bc34a")
"""Of the objects, in their order and then from the start again; told apart by colour-blind readers too."""


@dataclass(frozen=True)
class Tile:
    """One slice.

    Attributes:
        number: Of the slice.
        image: (H, W) grey or (H, W, 3), uint8.
        masks: (N, H, W) bool.
        truths: (N, H, W) bool, where it is known.
        asked: What was shown on this slice; places among the objects with it.
    """

    number: int
    image: np.ndarray
    masks: np.ndarray
    truths: np.ndarray | None = None
    asked: Sequence[tuple[int, Asked]] = ()


def chosen_slices(prompted: Sequence[int], found: Sequence[int]) -> list[int]:
    """Slices to draw: those that show an object, and others evenly spaced over where something is.

    Args:
        prompted: Numbers of the slices that show an object.
        found: Numbers of those where something is.

    Returns:
        At most `MOST_TILES`, ascending.
    """
    chosen = sorted(set(prompted))[:MOST_TILES]
    others = sorted(set(found) - set(chosen))
    count = min(MOST_TILES - len(chosen), len(others))
    places = np.linspace(0, len(others) - 1, count).round().astype(int).tolist()
    return sorted({*chosen, *(others[place] for place in places)})


def draw_tiles(tiles: Sequence[Tile], names: Sequence[str]) -> Image.Image:
    """Draw slices in rows, all cropped to where objects are in any of them; the truth is white.

    Args:
        tiles: At least one.
        names: Of the N objects.
    """
    crop = _crop(tiles)
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * TILE, _CAPTION + rows * (TILE + _CAPTION)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    left = 4.0
    legend = [(name, COLOURS[place % len(COLOURS)]) for place, name in enumerate(names)]
    if any(tile.truths is not None for tile in tiles):
        legend.insert(0, ("truth", _TRUTH))
    for words, colour in legend:
        shown = words.encode("latin-1", "replace").decode("latin-1")
        draw.text((left, 1), shown, fill=colour, font=font)
        left += draw.textlength(shown, font=font) + 12
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        corner = (column * TILE, _CAPTION + row * (TILE + _CAPTION))
        sheet.paste(_draw(tile, crop), corner)
        words = f"slice {tile.number}" + ("  shown here" if tile.asked else "")
        draw.text((corner[0] + 4, corner[1] + TILE + 1), words, fill=_INK, font=font)
    return sheet


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    picture.save(temporary, format="PNG")
    temporary.replace(path)


def _crop(tiles: Sequence[Tile]) -> Crop:
    """A square around all objects with a margin, or the whole image."""
    height, width = tiles[0].image.shape[:2]
    inside = np.zeros((height, width), bool)
    for tile in tiles:
        for masks in (tile.masks, tile.truths):
            if masks is not None:
                inside |= masks.any(axis=0)
        for _, one in tile.asked:
            if one.box is not None:
                left, top, right, bottom = (int(edge) for edge in one.box)
                inside[top : bottom + 1, left : right + 1] = True
            for x, y, _ in one.points:
                inside[int(y), int(x)] = True
    box = tight_box(inside)
    whole = max(height, width)
    x0, y0, x1, y1 = box or (0.0, 0.0, width - 1.0, height - 1.0)
    side = min(whole, round(max(1.4 * (max(x1 - x0, y1 - y0) + 1), 48)))
    corner = [
        round(min(max((low + high + 1 - side) / 2, 0), size - side)) if size > side else round((size - side) / 2)
        for low, high, size in ((x0, x1, width), (y0, y1, height))
    ]
    return Crop(corner[0], corner[1], side)


def _draw(tile: Tile, crop: Crop) -> Image.Image:
    picture = cropped(tile.image, crop, TILE, _PAPER)
    draw = ImageDraw.Draw(picture)
    for masks, colours in ((tile.truths, (_TRUTH,)), (tile.masks, COLOURS)):
        for place, mask in enumerate(() if masks is None else masks):
            _draw_outline(draw, mask, crop, colours[place % len(colours)], 1 if masks is tile.truths else 2)
    for place, one in tile.asked:
        _draw_prompt(draw, one, crop, COLOURS[place % len(COLOURS)])
    return picture


def _draw_outline(draw: ImageDraw.ImageDraw, mask: np.ndarray, crop: Crop, colour: str, width: int) -> None:
    coarse = -(-crop.side // (2 * TILE))
    corner = np.array([max(crop.x, 0) - crop.x, max(crop.y, 0) - crop.y])
    for line in outlines(mask, crop, coarse):
        points = (line * coarse + corner) * (TILE / crop.side)
        draw.line([(float(x), float(y)) for x, y in points], fill=colour, width=width)


def _draw_prompt(draw: ImageDraw.ImageDraw, one: Asked, crop: Crop, colour: str) -> None:
    scale, corner = TILE / crop.side, np.array([crop.x, crop.y])
    if one.box is not None:
        low, high = (np.array(one.box[:2]) - corner) * scale, (np.array(one.box[2:]) + 1 - corner) * scale
        draw.rectangle((float(low[0]), float(low[1]), float(high[0]), float(high[1])), outline=colour, width=1)
    for x, y, label in one.points:
        x, y = ((np.array([x, y]) + 0.5 - corner) * scale).tolist()
        if label:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), outline=colour, width=2)
        else:
            draw.line((x - 4, y - 4, x + 4, y + 4), fill=colour, width=2)
            draw.line((x - 4, y + 4, x + 4, y - 4), fill=colour, width=2)
