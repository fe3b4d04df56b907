"""Whole slides, through OpenSlide, which is an optional package.

A level that is too large for the memory is not read but opened: its windows are read when they are asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import UserError
from data_shards.readers.base import Role, Volume, Windowed, register

MAX_PIXELS = 2**28
"""Pixels of a level that is read whole: 0.8 GB."""
_BAND = 2048
"""Rows that are read at once: OpenSlide gives four bytes for a pixel, of which three are kept."""


def _parts(path: Path) -> list[Path]:
    """Return the files in the folder beside a ``.mrxs``, which hold its pixels."""
    folder = path.with_suffix("")
    return sorted(folder.iterdir()) if path.suffix.lower() == ".mrxs" and folder.is_dir() else []


@register(".svs", ".svslide", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", beside=_parts)
def read_slide(path: Path, role: Role, level: int = 0) -> Volume:
    """Read one level of a slide as RGB (1, Y, X, 3) uint8; a large one window by window, so that it needs ``patches``.

    Where nothing was scanned, the slide's background colour is shown. The spacing (z, y, x) has 1 for z, which a slide
    lacks.

    Args:
        path: The file. That of a ``.mrxs`` has a folder of the same name beside it.
        role: Unused: a mask is read the same way.
        level: Which level of the pyramid; 0 is the largest.

    Raises:
        UserError: OpenSlide is not installed or does not know the file, or the level does not exist.
    """
    try:
        import openslide
    except ImportError:
        raise UserError(f"{path}: slides need OpenSlide: pip install openslide-python openslide-bin") from None
    try:
        with openslide.OpenSlide(path) as slide:
            width, height = _size(path, slide.level_dimensions, level)
            factor = float(slide.level_downsamples[level])
            large = width * height > MAX_PIXELS
            array: Any = LargeSlide(path, level, (height, width)) if large else _pixels(slide, level, width, height)
            spacing = _spacing(slide.properties, factor)
    except openslide.OpenSlideUnsupportedFormatError:
        raise UserError(f"{path}: is no slide that OpenSlide knows, or is damaged") from None
    except openslide.OpenSlideError as error:
        raise UserError(f"{path}: cannot be read, is it complete? ({error})") from error
    parts = _parts(path)
    return Volume(array if large else array[np.newaxis], spacing, flat=True, files=(path, *parts) if parts else ())


def _size(path: Path, sizes: Any, level: int) -> tuple[int, int]:
    """Return width and height of a level."""
    if not 0 <= level < len(sizes):
        raise UserError(f"{path}: level: there is no level {level}, only 0 to {len(sizes) - 1}")
    width, height = sizes[level]
    return width, height


class LargeSlide(Windowed):
    """A level of a slide as a volume (1, Y, X, 3) uint8 of which windows are read."""

    def __init__(self, path: Path, level: int, size: tuple[int, int]) -> None:
        import openslide

        super().__init__((1, *size, 3), np.dtype(np.uint8))
        self._path, self._slide, self._level = path, openslide.OpenSlide(path), level
        self._factor = float(self._slide.level_downsamples[level])

    def __getitem__(self, place: tuple[int, slice, slice]) -> np.ndarray:
        """Read a window (y, x, 3) of the only slice.

        Raises:
            UserError: That part of the file is damaged.
        """
        import openslide

        _, rows, columns = place
        # Places are given in pixels of level 0.
        corner = round(columns.start * self._factor), round(rows.start * self._factor)
        size = columns.stop - columns.start, rows.stop - rows.start
        try:
            rgba = np.asarray(self._slide.read_region(corner, self._level, size))
        except openslide.OpenSlideError as error:
            raise UserError(f"{self._path}: cannot be read at {corner}, is it complete? ({error})") from error
        return _over(rgba, _background(self._slide))


def _background(slide: Any) -> np.ndarray:
    colour = slide.properties.get("openslide.background-color", "FFFFFF")
    return np.frombuffer(bytes.fromhex(colour), np.uint8)


def _over(rgba: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Return pixels (y, x, 4) over a background colour: (y, x, 3)."""
    part = np.ascontiguousarray(rgba[..., :3])
    clear = rgba[..., 3] < 255
    if clear.any():
        opacity = rgba[clear][:, 3:] / np.float32(255)
        part[clear] = np.rint(rgba[clear][:, :3] * opacity + background * (1 - opacity))
    return part


def _pixels(slide: Any, level: int, width: int, height: int) -> np.ndarray:
    """Read a level (Y, X, 3) over the background."""
    background = _background(slide)
    # Places are given in pixels of level 0: elsewhere bands would not meet exactly.
    band = _BAND if level == 0 else height
    array = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, band):
        rgba = np.asarray(slide.read_region((0, top), level, (width, min(band, height - top))))
        array[top : top + band] = _over(rgba, background)
    return array


def _spacing(properties: Any, factor: float) -> tuple[float, float, float] | None:
    """Return the spacing (z, y, x) in mm of a level that is so many times smaller than the largest."""
    try:
        y, x = (float(properties[f"openslide.mpp-{axis}"]) * factor / 1000 for axis in "yx")
    except (KeyError, ValueError):
        return None
    return (1.0, y, x) if 0 < y < np.inf and 0 < x < np.inf else None
