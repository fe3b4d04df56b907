"""DICOM RTSTRUCT: contours in the patient, filled on the slices of the image.

Shapes: N points; Z, Y, X the image's volume.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_shards.errors import UserError
from data_shards.readers.base import Drawing, Ground, Layer, Volume
from data_shards.readers.contours import fill
from data_shards.readers.dicom_files import clean_text, is_wanted, open_dicom
from data_shards.readers.dicom_planes import Match, check_place, voxels_at

if TYPE_CHECKING:
    from pydicom import Dataset

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_CONTOUR_DATA = 0x30060050


def read_rtstruct(path: Path, ground: Ground, match: Match, regions: list[str] | None = None) -> Drawing:
    """Read a set of contours: one layer of 0 and 1 for each region (ROI) with closed contours.

    A voxel is inside if its centre is inside an odd number of the region's contours on its slice, so that a contour in
    another one is a hole. A contour between slices goes to the nearest one; what reaches beyond the image's edges is
    cut off. Points and open lines have no inside: regions of nothing else, and those without a voxel, have no layer,
    and do not count as looked for.

    Args:
        path: The file.
        ground: The image that they lie on.
        match: See `data_shards.readers.dicom.read_dicom_drawing`.
        regions: Names of the only regions wanted.

    Raises:
        UserError: The file is damaged, or a contour lies elsewhere than the image or across its slices.
    """
    dataset = open_dicom(path)
    check_place(path, *_places(dataset), ground, match)
    names = {
        int(item.ROINumber): clean_text(item.get("ROIName")) for item in dataset.get("StructureSetROISequence") or []
    }
    if not names or "ROIContourSequence" not in dataset:
        raise UserError(f"{path}: lists no regions, or none of their contours: is it complete?")
    contours: dict[int, list[np.ndarray]] = {number: [] for number in names if is_wanted(names[number], regions)}
    for region in dataset.ROIContourSequence:
        number = int(region.ReferencedROINumber)
        if number not in names:
            raise UserError(f"{path}: holds contours of region {number}, which it does not list: is it complete?")
        for contour in (region.get("ContourSequence") or []) if number in contours else []:
            if str(contour.get("ContourGeometricType") or "") in _CLOSED:
                points = _points(contour, _where(path, names[number]))
                contours[number].append(np.round(voxels_at(ground.volume, points), 5))
    axis = _axis([points for found in contours.values() for points in found])
    layers: list[Layer] = []
    for number, found in contours.items():
        values, origin = _box(found, axis, ground.volume, _where(path, names[number]))
        if values.size:
            layers.append(Layer(values, origin, names[number], number))
    return Drawing(tuple(layers), complete=False)


def _where(path: Path, name: str) -> str:
    return f"{path}: region '{name}' (others can be read without it: reader: {{regions: [NAME, ...]}})"


def _places(dataset: Dataset) -> tuple[set[str], set[str]]:
    """Return the frames of reference and the series that a file names."""
    frames = {str(dataset.get("FrameOfReferenceUID") or "")}
    frames |= {
        str(item.get("ReferencedFrameOfReferenceUID") or "") for item in dataset.get("StructureSetROISequence") or []
    }
    series = {
        str(images.get("SeriesInstanceUID") or "-")
        for place in dataset.get("ReferencedFrameOfReferenceSequence") or []
        for study in place.get("RTReferencedStudySequence") or []
        for images in study.get("RTReferencedSeriesSequence") or []
    }
    return frames, series


def _points(contour: Dataset, where: str) -> np.ndarray:
    """Return the points (N, 3) of a contour in mm.

    They are taken from the text itself: the library makes an object of every number. Where there are too many for the
    field of its length, text is also all that it gives.
    """
    element = contour.get_item(_CONTOUR_DATA)
    value = None if element is None else element.value
    try:
        numbers = np.array(value.split(b"\\") if isinstance(value, bytes) else value, dtype=float)
    except (TypeError, ValueError):
        raise UserError(f"{where}: a contour holds no numbers: is the file complete?") from None
    count = contour.get("NumberOfContourPoints")
    if numbers.size == 0 or numbers.size % 3 or not np.isfinite(numbers).all():
        raise UserError(f"{where}: a contour is not made of points (x, y, z): is the file complete?")
    if count is not None and int(count) != numbers.size // 3:
        raise UserError(
            f"{where}: a contour has {numbers.size // 3} points, {int(count)} were promised: is it complete?"
        )
    return numbers.reshape(-1, 3)


def _axis(contours: list[np.ndarray]) -> int:
    """Return the axis (0 x, 1 y, 2 z) of the volume across which contours are flat: that of the slices."""
    if not contours:
        return 2
    extents = np.array([np.ptp(points, axis=0) for points in contours])
    return 2 - int(extents[:, ::-1].max(axis=0).argmin())  # z, if there is nothing to choose


def _box(contours: list[np.ndarray], axis: int, volume: Volume, where: str) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Fill the contours of a region: its box (z, y, x) and where it starts; an empty box if no voxel is inside."""
    nothing = np.zeros((0, 0, 0), np.uint8), (0, 0, 0)
    if not contours:
        return nothing
    slices = _by_slice(contours, axis, volume.array.shape[2 - axis], where)
    across = [other for other in range(3) if other != axis]  # columns and rows of a slice
    corners = np.concatenate(contours)[:, across]
    width, height = (volume.array.shape[2 - other] for other in across)
    if (corners.max(axis=0) < 0).any() or (corners.min(axis=0) > (width - 1, height - 1)).any():
        raise UserError(f"{where}: its contours lie beside the image: correct the pairing")
    low = np.ceil(corners.min(axis=0)).astype(int).clip(0)
    high = np.floor(corners.max(axis=0)).astype(int).clip(None, (width - 1, height - 1))
    if (high < low).any():  # no centre of a voxel inside
        return nothing
    first, last = min(slices), max(slices)
    box = np.zeros((last - first + 1, high[1] - low[1] + 1, high[0] - low[0] + 1), np.uint8)
    for number, found in slices.items():
        box[number - first] = fill([points[:, across] - low for points in found], *box.shape[1:])
    if not box.any():
        return nothing
    # The box has its slices first, then the later of the two axes (y before x, z before y and x).
    place = {axis: first, across[0]: int(low[0]), across[1]: int(low[1])}
    order = np.argsort([2 - axis, 2 - across[1], 2 - across[0]])
    return np.ascontiguousarray(box.transpose(order)), (place[2], place[1], place[0])


def _by_slice(contours: list[np.ndarray], axis: int, count: int, where: str) -> dict[int, list[np.ndarray]]:
    """Return the contours by the slice that each lies on."""
    found: dict[int, list[np.ndarray]] = {}
    depths: dict[int, float] = {}
    for points in contours:
        if np.ptp(points[:, axis]) > 0.5:
            raise UserError(f"{where}: a contour runs across slices of the image: it was drawn in another plane")
        depth = float(points[:, axis].mean())
        number = round(depth)
        if not 0 <= number < count:
            beyond = -depth if number < 0 else depth - count + 1
            raise UserError(f"{where}: a contour lies {beyond:.1f} slices beyond the image: give it the whole series")
        if abs(depths.setdefault(number, depth) - depth) > 0.1:
            raise UserError(
                f"{where}: contours lie closer to each other than the image's slices: it was drawn on another one"
            )
        found.setdefault(number, []).append(points)
    return found
