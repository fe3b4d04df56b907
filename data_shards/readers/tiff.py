"""TIFFs of science, through the package `tifffile`: what Pillow cannot read, or would read only a part of.

That is any number of channels, whether they lie in the pixels or in pages of their own, as ImageJ and OME write them,
16-bit colours, and numbers of more than 32 bits.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_shards.errors import UserError

_DESCRIPTION, _BITS, _SAMPLES, _PHOTOMETRIC, _EXTRA, _SAMPLE_FORMAT = 270, 258, 277, 262, 338, 339
_COMPRESSION, _ORIENTATION = 259, 274
"""Numbers of TIFF's tags."""

_RGB, _CMYK = 2, 5
_ALPHA = ((), (1,), (2,), (999,))
"""What a fourth sample beside red, green and blue may be called for Pillow to take it as opacity."""


def beyond_pillow(image: Image.Image) -> str:
    """Return what Pillow would lose of a picture, or nothing if it reads it whole."""
    if image.format != "TIFF":
        return ""
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    samples, bits = tags.get(_SAMPLES, 1), tags.get(_BITS, (1,))
    form = tags.get(_SAMPLE_FORMAT, (1,))[0]
    if bits[0] == 8 and form != 1:
        return "signed 8-bit numbers"  # Pillow takes them as unsigned
    if form != 1 and tags.prefix == b"MM" and tags.get(_COMPRESSION, 1) != 1:
        return "compressed big-endian numbers with signs"  # Pillow does not swap their bytes
    if samples > 1:
        kind, extra = tags.get(_PHOTOMETRIC), tags.get(_EXTRA, ())
        alpha = extra in _ALPHA and ((samples == 4 and kind == _RGB) or (samples == 2 and extra != ()))
        if max(bits) != 8:
            return f"{max(bits)}-bit colours"
        if not (samples == 3 or alpha or (samples == 4 and kind == _CMYK and extra == ())):
            return f"{samples} channels"
    return _beyond_pages(str(tags.get(_DESCRIPTION, "")), getattr(image, "n_frames", 1))


def _beyond_pages(description: str, pages: int) -> str:
    """Return what pages mean besides slices, according to ImageJ's or OME's text in the first."""
    if description.startswith("ImageJ="):
        said = {
            name: int(number)
            for name, number in re.findall(r"^(images|channels|frames)=(\d{1,9})\r?$", description, re.M)
        }
        if said.get("channels", 1) > 1 or said.get("frames", 1) > 1 or said.get("images", pages) != pages:
            return "ImageJ hyperstack"
    if "<OME" in description[:1000] and (pages > 1 or re.search(r'\bSize[CZT]="(?!1")', description)):
        return "OME-TIFF"
    return ""


def read_tiff(path: Path, why: str, level: int | None, stored: bool, max_pixels: int) -> np.ndarray:
    """Read the one image of a TIFF with all its pages and channels.

    Args:
        path: The file.
        why: What Pillow cannot read of it, for messages.
        level: Which level of a pyramid; ignored where there is none.
        stored: Take the pixels as they are stored, also where a tag turns them on the screen.
        max_pixels: Refuse larger ones.

    Returns:
        (Z, Y, X), or (Z, Y, X, C) for several channels.

    Raises:
        UserError: tifffile is not installed, or the file holds several images, time points or too many pixels.
    """
    try:
        import tifffile
    except ImportError:
        raise UserError(f"{path}: a TIFF with this ({why}) needs a package to be read: pip install tifffile") from None
    with _quiet(), tifffile.TiffFile(path) as file:
        if not file.series:
            raise UserError(f"{path}: cannot be read, is it complete? (it has no pages)")
        if len(file.series) != 1:
            raise UserError(f"{path}: holds {len(file.series)} images of different kinds: save one in a file")
        turn = file.pages.first.tags.valueof(_ORIENTATION, default=1)
        if turn != 1 and not stored:
            raise UserError(
                f"{path}: its tags turn it on the screen (orientation {turn}): save it upright, or say reader: "
                "{orientation: ignore} if its mask was drawn on the stored pixels"
            )
        levels = file.series[0].levels
        if len(levels) > 1 and not 0 <= (level or 0) < len(levels):
            raise UserError(f"{path}: level: there is no level {level}, only 0 to {len(levels) - 1}")
        series = levels[(level or 0) if len(levels) > 1 else 0]
        axes, shape = series.axes, tuple(int(side) for side in series.shape)
        _check(path, axes, shape, max_pixels)
        array = series.asarray()
    where = [axes.index(axis) for axis in "YX"]
    channels = [number for number, axis in enumerate(axes) if axis in "CS" and shape[number] > 1]
    pages = [number for number in range(len(axes)) if number not in (*where, *channels)]
    array = array.transpose(*pages, *where, *channels)
    return np.ascontiguousarray(array.reshape(-1, *(shape[number] for number in (*where, *channels))))


def _check(path: Path, axes: str, shape: tuple[int, ...], max_pixels: int) -> None:
    sides = dict(zip(axes, shape, strict=True))
    long = [axis for axis in axes if sides[axis] > 1]
    if sides.get("T", 1) > 1:
        raise UserError(f"{path}: has {sides['T']} points in time: save each in a file of its own")
    if axes.count("Y") != 1 or axes.count("X") != 1 or sum(axis in "CS" for axis in long) > 1:
        raise UserError(f"{path}: its axes are {axes} {shape}: save it as slices with channels")
    if sum(axis not in "CSYX" for axis in long) > 1:
        raise UserError(f"{path}: its axes are {axes} {shape}: save each stack of slices in a file of its own")
    pixels = int(np.prod([sides[axis] for axis in axes if axis not in "CS"], dtype=object))
    if pixels > max_pixels:
        raise UserError(f"{path}: has {pixels} pixels, more than {max_pixels}: cut it into pieces")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep tifffile from logging what it finds odd: the lines do not name the file, and the rest it raises."""
    logger = logging.getLogger("tifffile")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
