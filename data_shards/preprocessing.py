"""Intensity and slicing: from a volume to the images that are stored.

Shapes: Z, Y, X as in `readers`; N slices of H rows and W columns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data_shards.errors import UserError
from data_shards.readers import Volume, Windowed

Axis = Literal["axial", "coronal", "sagittal"]


@dataclass(frozen=True)
class Rescale:
    """A linear map of [low, high] onto 0–255, clipped; one fitted to a volume by an `Intensity`.

    Attributes:
        kind: The `Intensity` that chose the bounds.
        low: Source value that becomes 0; None keeps the values and their dtype.
        high: Source value that becomes 255, or None.
    """

    kind: str
    low: float | None = None
    high: float | None = None

    def apply(self, volume: np.ndarray) -> np.ndarray:
        """Map an array of any shape: uint8, or the array itself where there are no bounds."""
        if self.low is None or self.high is None:
            return volume
        if self.high <= self.low:  # a blank volume: nothing to stretch
            return np.where(volume > self.low, np.uint8(255), np.uint8(0))
        scale = 255.0 / (self.high - self.low)
        exact = np.result_type(volume.dtype, np.float32).type  # float32 for 16-bit data, float64 where it is needed
        mapped = (volume.astype(exact) - exact(self.low)) * exact(scale)
        return np.rint(np.clip(mapped, 0, 255)).astype(np.uint8)

    def provenance(self) -> dict[str, Any]:
        """Return what was done, as JSON."""
        if self.low is None:
            return {"kind": self.kind}
        return {"kind": self.kind, "low": self.low, "high": self.high, "range": [0, 255]}


class Intensity(ABC):
    """How the intensities of a volume become those stored. Bounds are taken over the whole volume, never per slice."""

    kind: str

    @abstractmethod
    def fit(self, volume: np.ndarray) -> Rescale:
        """Return the map for one volume (Z, Y, X) or (Z, Y, X, 3)."""

    def apply(self, volume: np.ndarray) -> np.ndarray:
        """Fit to a volume and map it."""
        return self.fit(volume).apply(volume)


WINDOWS: dict[str, tuple[float, float]] = {
    "soft_tissue": (40, 400),
    "lung": (-160, 1500),
    "brain": (40, 80),
    "bone": (400, 1800),
    "mediastinum": (50, 350),
}
"""Level and width in HU of CT windows by name: soft tissue, lung and brain as in MedSAM's Methods, bone as its authors'
challenge states it, mediastinum as radiologists commonly set it."""


@dataclass(frozen=True)
class Window(Intensity):
    """A fixed window, as of CT in Hounsfield units, to uint8: by name, or by level and width."""

    name: Literal["soft_tissue", "lung", "brain", "bone", "mediastinum"] | None = None
    """A named window; it stands for level and width."""
    level: float | None = None
    """Centre of the window."""
    width: float | None = None
    """Full width of the window."""
    kind: Literal["window"] = "window"

    def __post_init__(self) -> None:
        if self.name is not None:
            if self.level is not None or self.width is not None:
                raise UserError(f"the window '{self.name}' has its own level and width: give the name or the numbers")
            return
        if self.level is None or self.width is None:
            raise UserError(f"a window needs level and width, or a name: {', '.join(WINDOWS)}")
        if not (self.width > 0 and math.isfinite(self.width) and math.isfinite(self.level)):
            raise UserError(f"width must be above 0 and level a number, got {self.width:g} and {self.level:g}")

    def fit(self, volume: np.ndarray) -> Rescale:
        """Return the window, whatever the volume."""
        level, width = WINDOWS[self.name] if self.name is not None else (self.level, self.width)
        assert level is not None and width is not None  # __post_init__ saw to it
        return Rescale("window", float(level - width / 2), float(level + width / 2))


@dataclass(frozen=True)
class Percentiles(Intensity):
    """Between two percentiles of the volume, to uint8, as MedSAM does for all grey images but CT.

    MedSAM's paper prints "0.95th and 99.5th"; its released code takes 0.5 and 99.5, and so does this.
    """

    low: float = 0.5
    """Percentile that becomes 0."""
    high: float = 99.5
    """Percentile that becomes 255."""
    nonzero: bool = True
    """Take the percentiles over nonzero voxels only, as for MR and PET, whose background is no anatomy. False for
    X-ray, ultrasound, mammography and OCT."""
    kind: Literal["percentiles"] = "percentiles"

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 100:
            raise UserError(f"low and high must keep 0 <= low < high <= 100, got {self.low:g} and {self.high:g}")
        if self.high <= 1:
            raise UserError(f"low and high are per cent: write {self.high * 100:g}, not {self.high:g}")

    def fit(self, volume: np.ndarray) -> Rescale:
        """Return the map between the percentiles of the volume."""
        values = volume[volume != 0] if self.nonzero else volume
        if values.size == 0:  # a blank volume
            return Rescale("percentiles", 0.0, 0.0)
        # NumPy takes the difference of two neighbours, which their own dtype may not hold if it has signs.
        wider = {"int8": np.int32, "int16": np.int32, "int32": np.float64, "int64": np.float64}
        own = values.astype(wider.get(values.dtype.name, values.dtype))
        low, high = np.percentile(own, [self.low, self.high], overwrite_input=True)
        return Rescale("percentiles", float(low), float(high))


@dataclass(frozen=True)
class MinMax(Intensity):
    """Between the smallest and the largest value of the volume, to uint8."""

    kind: Literal["minmax"] = "minmax"

    def fit(self, volume: np.ndarray) -> Rescale:
        """Return the map between the extremes of the volume."""
        return Rescale("minmax", float(volume.min()), float(volume.max()))


@dataclass(frozen=True)
class Colour(Intensity):
    """Colours kept where they lie in 0–255 already, between smallest and largest value otherwise, as MedSAM does."""

    kind: Literal["rgb"] = "rgb"

    def fit(self, volume: np.ndarray) -> Rescale:
        """Return the identity, onto uint8 if the values are whole numbers or not yet it, or the map of the extremes."""
        if volume.dtype == np.uint8:
            return Rescale("none")
        low, high = float(volume.min()), float(volume.max())
        # Floats in 0–1 are in range too, but black on a screen.
        if low >= 0 and 1 < high <= 255:
            return Rescale("rgb", 0.0, 255.0)
        return Rescale("minmax", low, high)


@dataclass(frozen=True)
class Native(Intensity):
    """Values and dtype as they are in the file."""

    kind: Literal["none"] = "none"

    def fit(self, volume: np.ndarray) -> Rescale:
        """Return the identity."""
        return Rescale("none")


AnyIntensity = Window | Percentiles | MinMax | Colour | Native


def check_finite(array: np.ndarray, name: str) -> None:
    """Raise a `UserError` that names the file if an array holds NaN or infinity."""
    if not np.issubdtype(array.dtype, np.floating):
        return
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise UserError(
            f"{name}: {bad} of {array.size} voxels are NaN or infinite: repair the file or leave the case out"
        )


@dataclass(frozen=True)
class Stack:
    """A volume cut along one axis.

    Attributes:
        slices: (N, H, W) or (N, H, W, 3).
        spacing: Pixel spacing (row, column) in mm, or None.
        slice_spacing: Distance between slices in mm, or None.
    """

    slices: np.ndarray
    spacing: tuple[float, float] | None
    slice_spacing: float | None


def cut(volume: Volume, axis: Axis) -> Stack:
    """Cut an LPS volume into slices, without copying.

    Axial slices show anterior on top and the patient's right on the left, coronal ones superior on top and the
    patient's right on the left, sagittal ones superior on top and anterior on the left. Slice n of the stack lies at
    index n of the volume along z, y or x.
    """
    slices, spacing, order = slices_of(volume.array, axis), volume.spacing, _ORDER[axis]
    if spacing is None:
        return Stack(slices, None, None)
    return Stack(slices, (spacing[order[1]], spacing[order[2]]), spacing[order[0]])


def slices_of(array: np.ndarray, axis: Axis) -> np.ndarray:
    """View a volume (Z, Y, X) or (Z, Y, X, 3), or a box of one, as slices (N, H, W) or (N, H, W, 3) along an axis."""
    if isinstance(array, Windowed):  # a picture, which has one axis only
        return array
    upright = array if axis == "axial" else array[::-1]
    return upright.transpose(*_ORDER[axis], *range(3, array.ndim))


def place_of(
    origin: tuple[int, int, int], box: tuple[int, ...], shape: tuple[int, ...], axis: Axis
) -> tuple[int, int, int]:
    """Return where a box of a volume lies among the slices: (first slice, top row, left column).

    Args:
        origin: First voxel (z, y, x) of the box.
        box: Its shape (z, y, x).
        shape: Shape (Z, Y, X) of the volume.
        axis: The axis along which both are cut.
    """
    upright = origin if axis == "axial" else (shape[0] - origin[0] - box[0], *origin[1:])
    first, top, left = (upright[number] for number in _ORDER[axis])
    return first, top, left


_ORDER: dict[Axis, tuple[int, int, int]] = {"axial": (0, 1, 2), "coronal": (1, 0, 2), "sagittal": (2, 0, 1)}
"""Which axes of a volume are a stack's slices, rows and columns."""
