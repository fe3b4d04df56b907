"""DICOM SEG: segments as frames that lie anywhere on the image.

Shapes: R, C rows and columns of a frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_shards.errors import UserError
from data_shards.readers.base import Drawing, Ground, Layer
from data_shards.readers.dicom_files import clean_text, is_wanted, number_in, open_dicom
from data_shards.readers.dicom_pixels import PixelDecoder
from data_shards.readers.dicom_planes import Lie, Match, Plane, check_place, group, lie_on, plane_of

if TYPE_CHECKING:
    from pydicom import Dataset

_Piece = tuple[tuple[int, int, int], np.ndarray]
"""First voxel (z, y, x), and what lies from there on: (z, y, x) bool."""


def read_seg(path: Path, ground: Ground, match: Match, fraction: float, regions: list[str] | None = None) -> Drawing:
    """Read a segmentation object: one layer of 0 and 1 for each segment, whatever the order of its frames.

    Frames find their place by position; by the images that they name only where they have no position. A segment
    without a voxel is a layer of size 0: it was looked for. Only the segments that the file lists count as looked for.

    Args:
        path: The file.
        ground: The image that it lies on.
        match: See `data_shards.readers.dicom.read_dicom_drawing`.
        fraction: A voxel is inside a fractional segment from this part of its highest value on.
        regions: Names of the only segments wanted.

    Raises:
        UserError: The file is damaged, lies elsewhere than the image or beyond it, or needs resampling.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"{path}: fraction must be above 0 and at most 1, got {fraction:g}")
    dataset = open_dicom(path)
    names = _segments(dataset, path)
    if ground.volume.affine is not None:
        series = {str(item.get("SeriesInstanceUID", "")) for item in dataset.get("ReferencedSeriesSequence") or []}
        check_place(path, {str(dataset.get("FrameOfReferenceUID") or "")}, series, ground, match)
    sources = _Sources(ground, path)
    pieces: dict[int, list[_Piece]] = {number: [] for number in names if is_wanted(names[number], regions)}
    for frame, (number, inside) in _frames(dataset, path, list(names), fraction):
        if number in pieces and inside.any():
            lie = _lie(dataset, frame, path, ground, sources, match)
            pieces[number].append(_piece(lie, inside, ground, f"{path}: frame {frame + 1}"))
    layers = (_layer(found, names[number], number) for number, found in pieces.items())
    return Drawing(tuple(layers), complete=False)


def _segments(dataset: Dataset, path: Path) -> dict[int, str]:
    """Return the segments' names by their numbers, in the order of the file."""
    names: dict[int, str] = {}
    for item in dataset.get("SegmentSequence") or []:
        number = int(item.SegmentNumber)
        if number in names:
            raise UserError(f"{path}: two of its segments have the number {number}: write the file again")
        if number:  # label maps list their background as 0
            names[number] = clean_text(item.get("SegmentLabel"))
    if not names:
        raise UserError(f"{path}: lists no segments: is it complete?")
    return names


def _frames(
    dataset: Dataset, path: Path, known: list[int], fraction: float
) -> Iterator[tuple[int, tuple[int, np.ndarray]]]:
    """Yield (frame, (number of the segment, (R, C) bool))."""
    kind = str(dataset.get("SegmentationType") or "")
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise UserError(f"{path}: a SegmentationType of this kind is not read: BINARY, FRACTIONAL and LABELMAP are")
    highest = number_in(dataset, "MaximumFractionalValue", path) if kind == "FRACTIONAL" else None
    if kind == "FRACTIONAL" and not highest:
        raise UserError(f"{path}: is fractional, but does not say what the highest value is: write the file again")
    for frame, values in enumerate(_stored(dataset, path)):
        if kind == "LABELMAP":
            padding = number_in(dataset, "PixelPaddingValue", path) or 0
            for value in np.unique(values):
                if value not in known and value not in (0, padding):
                    raise UserError(f"{path}: frame {frame + 1} holds {value}, which is no segment's number")
                if value in known:
                    yield frame, (int(value), values == value)
            continue
        item = group(dataset, frame, "SegmentIdentificationSequence")
        number = None if item is None else int(item.ReferencedSegmentNumber)
        if number not in known:
            raise UserError(f"{path}: frame {frame + 1} belongs to no segment of its list: is it complete?")
        yield frame, (number, values != 0 if highest is None else values >= fraction * highest)


def _stored(dataset: Dataset, path: Path) -> Iterator[np.ndarray]:
    """Yield the stored values (R, C) frame by frame."""
    count, rows, columns = int(dataset.get("NumberOfFrames") or 1), int(dataset.Rows), int(dataset.Columns)
    groups = len(dataset.get("PerFrameFunctionalGroupsSequence") or [])
    if groups != count:
        raise UserError(f"{path}: has {count} frames and describes {groups}: is it complete?")
    if dataset.get("BitsAllocated") != 1 or dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        with PixelDecoder() as decoder:
            yield from decoder.frames(dataset, path)[0]
        return
    # Bits run on from frame to frame. Unpacked all at once, they would take eight times the file.
    size, data = rows * columns, np.frombuffer(dataset.get("PixelData", b""), np.uint8)
    if size < 1 or data.size * 8 < size * count:
        raise UserError(f"{path}: has fewer pixels than its header promises: copy it again or leave it out")
    if dataset.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.2" and dataset["PixelData"].VR == "OW":
        data = data.reshape(-1, 2)[:, ::-1].ravel()  # words of two bytes, the higher one first
    for frame in range(count):
        start, end = frame * size, (frame + 1) * size
        bits = np.unpackbits(data[start // 8 : -(-end // 8)], bitorder="little")
        yield bits[start % 8 :][:size].reshape(rows, columns)


def _lie(dataset: Dataset, frame: int, path: Path, ground: Ground, sources: _Sources, match: Match) -> Lie:
    """Return how a frame lies on the image."""
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    where = f"{path}: frame {frame + 1}"
    if ground.volume.affine is None:
        if (rows, columns) != ground.volume.array.shape[1:3]:
            raise UserError(f"{where} has {rows} x {columns} pixels, unlike its image {ground.path}: resample it")
        return Lie((sources.picture(dataset, frame, match), 0, 0), (2, 0, 1), (False, False))
    plane = plane_of(dataset, frame, path) or sources.plane(dataset, frame)
    return lie_on(ground.volume, plane, rows, columns, where)


def _piece(lie: Lie, inside: np.ndarray, ground: Ground, where: str) -> _Piece:
    """Return what of a frame is inside, cropped, and where it lies in the volume."""
    box = lie.lay(inside)
    filled = [np.flatnonzero(box.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)]
    first, last = (np.array([places[end] for places in filled]) for end in (0, -1))
    place = np.array(lie.origin) + first
    if (place < 0).any() or (place + last - first >= ground.volume.array.shape[:3]).any():
        raise UserError(
            f"{where} has voxels beyond its image {ground.path}: give it the whole series, or crop both the same way"
        )
    z, y, x = (slice(int(low), int(high) + 1) for low, high in zip(first, last, strict=True))
    return (int(place[0]), int(place[1]), int(place[2])), np.ascontiguousarray(box[z, y, x])


def _layer(pieces: list[_Piece], name: str, number: int) -> Layer:
    """Put the pieces of a segment into the box that holds them all."""
    if not pieces:
        return Layer(np.zeros((0, 0, 0), np.uint8), name=name, number=number)
    low = np.min([origin for origin, _ in pieces], axis=0)
    high = np.max([np.add(origin, piece.shape) for origin, piece in pieces], axis=0)
    values = np.zeros(high - low, np.uint8)
    for origin, piece in pieces:
        z, y, x = (slice(int(start), int(start) + size) for start, size in zip(origin - low, piece.shape, strict=True))
        values[z, y, x] |= piece
    return Layer(values, (int(low[0]), int(low[1]), int(low[2])), name, number)


class _Sources:
    """The images that frames without a position name."""

    def __init__(self, ground: Ground, path: Path) -> None:
        self._ground, self._path = ground, path
        self._known: dict[str, tuple[Path, Dataset]] | None = None

    def plane(self, dataset: Dataset, frame: int) -> Plane:
        """Return the plane of the one image that a frame was drawn on."""
        name, number = self._source(dataset, frame)
        if name not in self._images():
            raise UserError(
                f"{self._path}: frame {frame + 1} has no position and names no image of {self._ground.path}: "
                "correct the pairing"
            )
        path, image = self._images()[name]
        plane = plane_of(image, number, path)
        if plane is None:
            raise UserError(f"{self._path}: neither frame {frame + 1} nor its image says where it lies")
        return plane

    def picture(self, dataset: Dataset, frame: int, match: Match) -> int:
        """Return which frame of pictures without a place a frame was drawn on."""
        name, number = self._source(dataset, frame)
        if match == "frame" and name and name not in self._images():
            raise UserError(
                f"{self._path}: frame {frame + 1} was drawn on another image than {self._ground.path}: correct the "
                "pairing, or, if it does belong to it, set reader: {match: position}"
            )
        if number >= self._ground.volume.array.shape[0]:
            raise UserError(f"{self._path}: frame {frame + 1} was drawn on frame {number + 1}, which the image lacks")
        return number

    def _source(self, dataset: Dataset, frame: int) -> tuple[str, int]:
        """Return the identifier of the image that a frame names, empty if none, and which frame of it, from 0."""
        derived = group(dataset, frame, "DerivationImageSequence")
        named = [] if derived is None else list(derived.get("SourceImageSequence") or [])
        if len(named) > 1:
            raise UserError(f"{self._path}: frame {frame + 1} has no position and names several images")
        if not named:
            return "", 0
        numbers = np.atleast_1d(named[0].get("ReferencedFrameNumber") or 1)
        if len(numbers) > 1:
            raise UserError(f"{self._path}: frame {frame + 1} has no position and names several frames")
        return str(named[0].get("ReferencedSOPInstanceUID") or ""), int(numbers[0]) - 1

    def _images(self) -> dict[str, tuple[Path, Dataset]]:
        if self._known is None:
            self._known = {}
            for file in self._ground.volume.files:
                image = open_dicom(file, _PLACE)
                self._known[str(image.get("SOPInstanceUID") or "")] = (file, image)
        return self._known


_PLACE = (
    "SOPInstanceUID",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
