"""Where the slices of DICOM files lie in the patient, and where a point of the patient lies in a volume.

Shapes: R, C are the rows and columns of a slice, N points or slices. DICOM's axes run to the patient's left, back and
head (LPS); the affine of a `Volume` is in NIfTI's frame, whose first two run the other way (RAS).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_shards.errors import UserError
from data_shards.readers.base import Ground, Volume
from data_shards.readers.dicom_files import numbers, open_dicom

if TYPE_CHECKING:
    from pydicom import Dataset

RAS = np.array([-1.0, -1.0, 1.0])
"""Turns a point of DICOM's frame into one of NIfTI's, and back."""

Match = Literal["frame", "position"]
"""``frame``: what was drawn must name the image's frame of reference or series; ``position``: places are enough."""


@dataclass(frozen=True)
class Plane:
    """A slice in the patient, in mm of DICOM's frame.

    Attributes:
        position: (3,) centre of its first pixel.
        along_row: (3,) from a pixel to the next in its row: the next column.
        along_column: (3,) from a pixel to the next in its column: the next row.
    """

    position: np.ndarray
    along_row: np.ndarray
    along_column: np.ndarray

    @property
    def normal(self) -> np.ndarray:
        """(3,) of length 1, at right angles to rows and columns."""
        found = np.cross(self.along_row, self.along_column)
        return found / np.linalg.norm(found)

    def corners(self, rows: int, columns: int) -> np.ndarray:
        """Return (4, 3) centres of the corner pixels: first, end of first row, end of first column, last."""
        right, down = self.along_row * (columns - 1), self.along_column * (rows - 1)
        return self.position + np.stack([np.zeros(3), right, down, right + down])


def group(dataset: Dataset, frame: int, keyword: str) -> Any:
    """Return the functional group of a frame: its own, or the one that all share; None if there is neither."""
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for item in ([own[frame]] if frame < len(own) else []) + list(shared[:1]):
        found = item.get(keyword)
        if found:
            return found[0]
    return None


def plane_of(dataset: Dataset, frame: int, path: Path) -> Plane | None:
    """Return where a frame lies, or None if the file does not say.

    Raises:
        UserError: What the file says makes no sense.
    """
    if "SharedFunctionalGroupsSequence" in dataset or "PerFrameFunctionalGroupsSequence" in dataset:
        place, turn = group(dataset, frame, "PlanePositionSequence"), group(dataset, frame, "PlaneOrientationSequence")
        pixel = group(dataset, frame, "PixelMeasuresSequence")
    else:
        place = turn = pixel = dataset if _frames(dataset) == 1 else None
    position = numbers(place, "ImagePositionPatient", 3, path)
    cosines = numbers(turn, "ImageOrientationPatient", 6, path)
    if position is None or cosines is None:
        return None
    spacing = numbers(pixel, "PixelSpacing", 2, path)
    if spacing is None or spacing.min() <= 0:
        raise UserError(f"{path}: says where it lies, but not the distance of its pixels: repair the header")
    row, column = cosines[:3], cosines[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(row @ column)) > 0.01:
        raise UserError(f"{path}: its rows and columns are not at right angles: repair ImageOrientationPatient")
    # PixelSpacing names the distance of rows first: it is the step along a column.
    return Plane(position, row / lengths[0] * spacing[1], column / lengths[1] * spacing[0])


def _frames(dataset: Dataset) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


@dataclass(frozen=True)
class Uneven(Volume):
    """A volume whose slices are not at even distances, as a gap was allowed.

    Attributes:
        stacked: (4, 4) affine of the slices as they were stacked, before they were turned.
        places: (N,) where each slice lies, in steps of that affine.
    """

    stacked: np.ndarray | None = None
    places: np.ndarray | None = None


def voxels_at(volume: Volume, points: np.ndarray) -> np.ndarray:
    """Return where points lie in a volume.

    Args:
        volume: A volume with an affine.
        points: (N, 3) mm in DICOM's frame.

    Returns:
        (N, 3) index (x, y, z) of the volume's array, in fractions of voxels; whole at the centres.
    """
    assert volume.affine is not None
    world = np.column_stack([points * RAS, np.ones(len(points))])
    if not isinstance(volume, Uneven) or volume.stacked is None or volume.places is None:
        return (world @ np.linalg.inv(volume.affine).T)[:, :3]
    index = world @ np.linalg.inv(volume.stacked).T
    steps, last = volume.places, len(volume.places) - 1
    depth = index[:, 2]
    beyond = np.minimum(depth - steps[0], 0) + np.maximum(depth - steps[-1], 0)
    index[:, 2] = np.interp(depth, steps, np.arange(last + 1)) + beyond
    return (index @ (np.linalg.inv(volume.affine) @ volume.stacked).T)[:, :3]


@dataclass(frozen=True)
class Lie:
    """How the pixels of a frame lie on the voxels of a volume, at right angles.

    Attributes:
        origin: First voxel (z, y, x) of the frame's box; may lie outside the volume.
        order: How the axes (row, column, across) of the frame become (z, y, x).
        flips: Whether the frame's rows, and its columns, run against the volume's.
    """

    origin: tuple[int, int, int]
    order: tuple[int, int, int]
    flips: tuple[bool, bool]

    def lay(self, frame: np.ndarray) -> np.ndarray:
        """Turn a frame (R, C) into its box (z, y, x)."""
        rows, columns = (slice(None, None, -1 if flip else 1) for flip in self.flips)
        return frame[rows, columns, None].transpose(self.order)


_SNAP = 0.25
"""How far, in voxels, a pixel of a frame may lie from the centre of a voxel. Places are rounded in files."""


def lie_on(volume: Volume, plane: Plane, rows: int, columns: int, what: str) -> Lie:
    """Find how a frame lies on a volume.

    Args:
        volume: A volume with an affine.
        plane: Where the frame lies.
        rows: Its rows.
        columns: Its columns.
        what: What it is, for messages.

    Raises:
        UserError: It lies between the voxels or across them.
    """
    # A frame of one row or column has a direction too.
    corners = voxels_at(volume, plane.corners(max(rows, 2), max(columns, 2)))
    right, down = corners[1] - corners[0], corners[2] - corners[0]
    axis_right, axis_down = int(np.abs(right).argmax()), int(np.abs(down).argmax())
    across = 3 - axis_right - axis_down
    first = np.rint(corners[0])
    expected = np.tile(first, (4, 1))
    expected[[1, 3], axis_right] += np.sign(right[axis_right]) * (max(columns, 2) - 1)
    expected[[2, 3], axis_down] += np.sign(down[axis_down]) * (max(rows, 2) - 1)
    apart = np.abs(corners - expected).max()
    if axis_right == axis_down or apart > _SNAP:
        raise UserError(
            f"{what} does not lie on the voxels of its image (up to {apart:.1f} voxels apart): resample it onto them"
        )
    flips = bool(down[axis_down] < 0), bool(right[axis_right] < 0)
    start = first.astype(int)
    start[axis_down] -= (rows - 1) if flips[0] else 0
    start[axis_right] -= (columns - 1) if flips[1] else 0
    # Axes are counted from x in points, and from z in arrays.
    order = np.argsort([2 - axis_down, 2 - axis_right, 2 - across])
    return Lie((int(start[2]), int(start[1]), int(start[0])), (int(order[0]), int(order[1]), int(order[2])), flips)


def check_place(path: Path, frames: set[str], series: set[str], ground: Ground, match: Match) -> None:
    """Raise unless what was drawn belongs to its image.

    Args:
        path: The file of the drawing.
        frames: The frames of reference that it names.
        series: The series that it names.
        ground: The image.
        match: What has to agree.

    Raises:
        UserError: The image has no place, or the drawing names another frame of reference and another series.
    """
    volume = ground.volume
    if volume.affine is None:
        raise UserError(
            f"{path}: its image {ground.path} does not say where it lies in the patient: nothing fits on it"
        )
    frames = frames - {""}
    # A NIfTI file has no frame of reference to compare; other tools write new ones, and name the series.
    if match == "position" or volume.frame is None or not frames or frames == {volume.frame}:
        return
    if (
        volume.files
        and str(open_dicom(volume.files[0], ("SeriesInstanceUID",)).get("SeriesInstanceUID", "-")) in series
    ):
        return
    raise UserError(
        f"{path}: was drawn in another frame of reference than its image {ground.path}: correct the pairing, or, if "
        "they do share their coordinates, set reader: {match: position}"
    )
