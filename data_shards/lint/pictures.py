"""Small pictures of samples for the page: the image, its masks as outlines, the target that is meant with its box.

Shapes: H, W are the image's native height and width, h, w the picture's.
"""

from __future__ import annotations

import base64
import io
from contextlib import suppress

import numpy as np
from PIL import Image

from data_shards.errors import UserError
from data_shards.triplet import Target, Triplet

SIDE = 224
"""Longest side of a picture in pixels."""
_MOST_TARGETS = 100
"""Targets whose outlines are drawn."""
COLOURS = ((255, 176, 0), (86, 180, 233), (255, 255, 255))
"""Of the target that is meant, of the others, and of the box."""
_COLOURS = 256 - len(COLOURS)
"""Colours that are left for the image itself."""
_MEANT, _OTHER, _BOX = range(_COLOURS, 256)


def draw(triplet: Triplet, meant: int = -1) -> str:
    """Return a sample as a PNG in a data URI.

    Args:
        triplet: The sample.
        meant: Number of the target to point out; −1 for none.
    """
    height, width = triplet.image.shape[:2]
    longest = max(height, width)
    scale = SIDE / longest if longest > SIDE else float(SIDE // longest)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    drawn = _shown(triplet.image).resize(size, Image.Resampling.BOX).convert("RGB").quantize(_COLOURS)
    # Numbers of colours: those of the image, and the few that are drawn with.
    palette = (drawn.getpalette() or [])[: 3 * _COLOURS]
    palette += [0] * (3 * _COLOURS - len(palette)) + [channel for colour in COLOURS for channel in colour]
    picture = np.array(drawn)
    chosen = list(enumerate(triplet.targets[:_MOST_TARGETS]))
    if meant >= _MOST_TARGETS:
        chosen.append((meant, triplet.targets[meant]))
    for number, target in sorted(chosen, key=lambda item: item[0] == meant):  # what is meant lies on top
        mask = None
        with suppress(UserError):  # damaged run lengths have no outline
            mask = target.mask()
        if number == meant and (mask is None or mask.any()):  # the box of an empty mask would be a stray mark
            _draw_box(picture, target)
        if mask is not None:
            picture[_outline(mask, size)] = _MEANT if number == meant else _OTHER
    result = Image.fromarray(picture, "P")
    result.putpalette(palette)
    buffer = io.BytesIO()
    result.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _shown(image: np.ndarray) -> Image.Image:
    """Return an image as 8 bits: as they are, or from the half to the 99.5th percentile of what is finite."""
    if image.dtype != np.uint8:
        step = max(1, max(image.shape[:2]) // 2048)
        values = image[::step, ::step].astype(np.float64)
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, [0.5, 99.5]) if finite.size else (0.0, 1.0)
        with np.errstate(over="ignore", invalid="ignore"):
            share = (values - low) / max(high - low, 1e-12)
        image = (np.nan_to_num(share, nan=0, posinf=1, neginf=0).clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(image)


def _outline(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the outermost pixels of a mask (H, W) in a picture: (h, w) bool; none of its parts is too small."""
    small = np.asarray(Image.fromarray(mask * np.uint8(255)).resize(size, Image.Resampling.BOX))
    # The mean of a block is above 0 where one of some 250 pixels is inside; beyond that, the place of one will do.
    inside = small > (0 if mask.shape[0] > size[1] else 127)
    if not inside.any() and mask.any():
        row, column = np.argwhere(mask)[0]
        inside = inside.copy()
        inside[row * size[1] // mask.shape[0], column * size[0] // mask.shape[1]] = True
    framed = np.pad(inside, 1)
    core = framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
    return np.asarray(inside & ~core)


def _draw_box(picture: np.ndarray, target: Target) -> None:
    """Draw a dotted box, two pixels outside of what it holds."""
    height, width = picture.shape[:2]
    down, across = height / target.size[0], width / target.size[1]
    x0, y0, x1, y1 = target.box
    left, right = max(0, int(x0 * across) - 3), min(width - 1, int((x1 + 1) * across) + 2)
    top, bottom = max(0, int(y0 * down) - 3), min(height - 1, int((y1 + 1) * down) + 2)
    picture[[top, bottom], left : right + 1 : 2] = _BOX
    picture[top : bottom + 1 : 2, [left, right]] = _BOX
