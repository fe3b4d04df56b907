"""Whole slides, through OpenSlide, which is an optional package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import UserError
from data_shards.readers.base import Role, Volume, register
from data_shards.readers.images import MAX_PIXELS

_BAND = 2048
"""Rows that are read at once: OpenSlide gives four bytes for a pixel, of which three are kept."""


def _parts(path: Path) -> list[Path]:
    """Return the files in the folder beside a ``.mrxs``, which hold its pixels."""
    folder = path.with_suffix("")
    return sorted(folder.iterdir()) if path.suffix.lower() == ".mrxs" and folder.is_dir() else []


@register(".svs", ".svslide", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", beside=_parts)
def read_slide(path: Path, role: Role, level: int = 0) -> Volume:
    """Read one level of a slide as RGB (1, Y, X, 3) uint8.

    Where nothing was scanned, the slide's background colour is shown. The spacing (z, y, x) has 1 for z, which a slide
    lacks.

    Args:
        path: The file. That of a ``.mrxs`` has a folder of the same name beside it.
        role: Unused: a mask is read the same way.
        level: Which level of the pyramid; 0 is the largest.

    Raises:
        UserError: OpenSlide is not installed or does not know the file, or the level does not exist or is too large.
    """
    try:
        import openslide
    except ImportError:
        raise UserError(f"{path}: slides need OpenSlide: pip install openslide-python openslide-bin") from None
    try:
        with openslide.OpenSlide(path) as slide:
            width, height = _size(path, slide.level_dimensions, level)
            factor = float(slide.level_downsamples[level])
            array = _pixels(slide, level, width, height)
            spacing = _spacing(slide.properties, factor)
    except openslide.OpenSlideUnsupportedFormatError:
        raise UserError(f"{path}: is no slide that OpenSlide knows, or is damaged") from None
    except openslide.OpenSlideError as error:
        raise UserError(f"{path}: cannot be read, is it complete? ({error})") from error
    parts = _parts(path)
    return Volume(array[np.newaxis], spacing, flat=True, files=(path, *parts) if parts else ())


def _size(path: Path, sizes: Any, level: int) -> tuple[int, int]:
    """Return width and height of a level that can be held in memory."""
    if not 0 <= level < len(sizes):
        raise UserError(f"{path}: level: there is no level {level}, only 0 to {len(sizes) - 1}")
    width, height = sizes[level]
    if width * height <= MAX_PIXELS:
        return width, height
    fitting = [number for number, (w, h) in enumerate(sizes) if w * h <= MAX_PIXELS]
    hint = f"choose a smaller level: reader: {{level: {fitting[0]}}}" if fitting else "cut it into pieces"
    raise UserError(f"{path}: level {level} has {width} x {height} pixels, more than {MAX_PIXELS}: {hint}")


def _pixels(slide: Any, level: int, width: int, height: int) -> np.ndarray:
    """Read a level (Y, X, 3) over the background."""
    colour = slide.properties.get("openslide.background-color", "FFFFFF")
    background = np.frombuffer(bytes.fromhex(colour), np.uint8)
    # Places are given in pixels of level 0: elsewhere bands would not meet exactly.
    band = _BAND if level == 0 else height
    array = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, band):
        rgba = np.asarray(slide.read_region((0, top), level, (width, min(band, height - top))))
        part = array[top : top + band]
        part[...] = rgba[..., :3]
        clear = rgba[..., 3] < 255
        if clear.any():
            opacity = rgba[clear][:, 3:] / np.float32(255)
            part[clear] = np.rint(rgba[clear][:, :3] * opacity + background * (1 - opacity))
    return array


def _spacing(properties: Any, factor: float) -> tuple[float, float, float] | None:
    """Return the spacing (z, y, x) in mm of a level that is so many times smaller than the largest."""
    try:
        y, x = (float(properties[f"openslide.mpp-{axis}"]) * factor / 1000 for axis in "yx")
    except (KeyError, ValueError):
        return None
    return (1.0, y, x) if 0 < y < np.inf and 0 < x < np.inf else None
