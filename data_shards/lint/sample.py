"""One sample as the checks see it, and the few numbers that are kept of it.

Shapes: H, W are the image's native height and width in pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from data_shards.errors import UserError
from data_shards.lint.likeness import SIDE, WORDS, fingerprint
from data_shards.triplet import SPLIT_UNITS, Target, Triplet

ROW = np.dtype(
    [
        ("content", np.uint64, 2),  # hash of the pixels' values
        ("hash", np.uint64, WORDS),
        ("thumbnail", np.uint8, (SIDE, SIDE)),
        ("plain", np.bool_),  # constant or nearly: it is like any other of its kind
        ("patch", np.bool_),
        ("axis", np.uint8),  # place in AXES
        ("split_unit", np.uint8),  # place in SPLIT_UNITS
        ("height", np.int32),
        ("width", np.int32),
        ("scale", np.float32),  # 99th percentile of the absolute values
        ("depth", np.uint8),  # bits a value has: 8, 16, 32, 64
        ("bits", np.uint8),  # bits that integers of 16 bits use, in whole bytes
        ("dark", np.float32),  # share of the pixels with the least value
        ("bright", np.float32),  # share of the pixels with the greatest value
    ]
)
"""What is kept of a sample: some 400 bytes."""

AXES = ("", "axial", "coronal", "sagittal")
"""An axis that is none of these counts as the first."""

_FEW = 4096
"""Pixels, evenly spaced, from which percentiles are taken."""


@dataclass(frozen=True)
class Pixels:
    """What the values of an image are like; NaN and infinities are left out.

    Attributes:
        low: The least value.
        high: The greatest.
        wrong: Number of values that are NaN or infinite.
        dark: Share of the pixels with the least value; 0 where it was not counted.
        bright: Share of the pixels with the greatest value; likewise.
        levels: Number of different values of an 8-bit image; 0 for others.
        common: Share of the pixels with the most common value of an 8-bit image; 0 for others.
    """

    low: float
    high: float
    wrong: int
    dark: float
    bright: float
    levels: int = 0
    common: float = 0.0

    @property
    def constant(self) -> bool:
        """Whether there is one value only."""
        return self.low == self.high


@dataclass(frozen=True)
class Outline:
    """What a mask's run lengths say.

    Attributes:
        box: Tight box (x0, y0, x1, y1), both ends included; None for an empty mask.
        area: Number of pixels.
        damage: Why they cannot be read; empty if they can.
    """

    box: tuple[int, int, int, int] | None
    area: int
    damage: str = ""


class Sample:
    """A triplet with what several checks ask of it, each measured once."""

    def __init__(self, triplet: Triplet) -> None:
        self.triplet = triplet

    @property
    def image(self) -> np.ndarray:
        """The image (H, W) or (H, W, 3)."""
        return self.triplet.image

    @cached_property
    def pixels(self) -> Pixels:
        """What the values of the image are like."""
        image = self.image
        if image.dtype == np.uint8:
            return _count_bytes(image)
        wrong = 0
        values = image.reshape(-1)
        if image.dtype.kind == "f":
            finite = np.isfinite(values)
            wrong = values.size - int(np.count_nonzero(finite))
            values = values[finite] if wrong else values
        if not values.size:
            return Pixels(0, 0, wrong, 0, 0)
        low, high = values.min(), values.max()
        dark, bright = (np.count_nonzero(values == end) / values.size for end in (low, high))
        return Pixels(float(low), float(high), wrong, dark, bright)

    @cached_property
    def outlines(self) -> tuple[Outline, ...]:
        """What the run lengths of each target say."""
        return tuple(map(_outline, self.triplet.targets))

    def row(self) -> np.ndarray:
        """Return what is kept of the sample: () of type `ROW`."""
        row, image, pixels, origin = np.zeros((), ROW), self.image, self.pixels, self.triplet.provenance
        row["hash"], row["thumbnail"] = fingerprint(image)
        row["content"] = self._content()
        row["plain"] = pixels.constant or max(pixels.common, pixels.dark, pixels.bright) > 0.995
        row["patch"] = origin.patch is not None
        row["axis"] = AXES.index(origin.axis) if origin.axis in AXES else 0
        row["split_unit"] = SPLIT_UNITS.index(origin.split_unit)
        row["height"], row["width"] = image.shape[:2]
        row["depth"] = 8 * image.dtype.itemsize
        row["bits"] = self._used_bits()
        row["dark"], row["bright"] = pixels.dark, pixels.bright
        flat = image.reshape(-1)
        few = flat[:: max(1, flat.size // _FEW)].astype(np.float64)
        few = few[np.isfinite(few)]
        with np.errstate(over="ignore"):  # beyond float32: infinite
            row["scale"] = np.percentile(np.abs(few), 99) if few.size else 0
        return row

    def _content(self) -> np.ndarray:
        """Hash of size and values, whatever the type and the number of channels that they are stored with: (2,)."""
        image, pixels = self.image, self.pixels
        if image.ndim == 3 and (image[..., :1] == image).all():
            image = image[..., 0]
        if image.dtype.kind in "iu":
            fitting = next(kind for kind in (np.uint8, np.int16, np.int64) if _fits(pixels, kind) or kind is np.int64)
            image = image.astype(fitting, copy=False)
        start = f"{image.shape} {image.dtype.str}".encode()
        hashed = hashlib.blake2b(start, digest_size=16)
        hashed.update(np.ascontiguousarray(image).data)
        return np.frombuffer(hashed.digest(), np.uint64)

    def _used_bits(self) -> int:
        """Bits that integers of 16 bits use: 8 if none is above 255 or if all are bytes that were spread out."""
        image, pixels = self.image, self.pixels
        if image.dtype.kind not in "iu" or image.dtype.itemsize != 2:
            return 8 * image.dtype.itemsize
        if pixels.low >= 0 and pixels.high <= 255:
            return 8
        for step in (256, 257):
            if not (image.reshape(-1)[:: max(1, image.size // _FEW)] % step).any() and not (image % step).any():
                return 8
        return 16


def _fits(pixels: Pixels, kind: type[np.generic]) -> bool:
    limits = np.iinfo(kind)  # type: ignore[type-var]
    return bool(limits.min <= pixels.low and pixels.high <= limits.max)


def _count_bytes(image: np.ndarray) -> Pixels:
    """Measure an 8-bit image (H, W) or (H, W, 3) through its histogram; ends are those where all channels have them."""
    counts = np.array(Image.fromarray(image).histogram()).reshape(-1, 256)
    each = counts.sum(axis=0)
    used = np.flatnonzero(each)
    low, high = int(used[0]), int(used[-1])
    pixels = image.shape[0] * image.shape[1]
    levels = int((counts > 0).sum(axis=1).max())
    common = float(counts.max(axis=1).min()) / pixels
    return Pixels(low, high, 0, counts[:, low].min() / pixels, counts[:, high].min() / pixels, levels, common)


def _outline(target: Target) -> Outline:
    try:
        return Outline(*target.measure())
    except UserError as error:
        return Outline(None, 0, str(error))
