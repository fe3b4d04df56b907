"""DICOM: images as a folder with a series or as one file, and what was drawn on them (SEG, RTSTRUCT, label maps).

Shapes: Z slices of R rows and C columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data_shards.errors import UserError
from data_shards.readers.axes import turn_to_lps
from data_shards.readers.base import FOLDER, Drawing, Ground, Layer, Role, Volume, read, register, register_drawing
from data_shards.readers.dicom_files import Header, headers_of, number_in, numbers, open_dicom, reading, series_in
from data_shards.readers.dicom_pixels import PixelDecoder, blank, picture, rescale, scale_of
from data_shards.readers.dicom_planes import RAS, Match, Plane, Uneven, plane_of
from data_shards.readers.dicom_seg import read_seg
from data_shards.readers.rtstruct import read_rtstruct

if TYPE_CHECKING:
    from pydicom import Dataset


@register(FOLDER, ".dcm", ".dicom", ".ima", "")
def read_dicom(
    path: Path,
    role: Role,
    series: int | None = None,
    series_uid: str | None = None,
    gaps: Literal["error", "allow"] = "error",
    tilt: Literal["error", "allow"] = "error",
    localizers: Literal["error", "drop"] = "error",
    burned_in: Literal["refuse", "allow"] = "refuse",
) -> Volume:
    """Read the images of a DICOM series, in the order of their places, in the unit of the modality, such as HU.

    Images without a place in the patient, as of X-ray or ultrasound, are pictures. Nothing but pixels and their place
    is taken from the header.

    Args:
        path: A file, or the folder that holds the files of the series.
        role: Labels keep their stored values where an image is turned for the screen (MONOCHROME1).
        series: SeriesNumber, where a folder holds several series.
        series_uid: SeriesInstanceUID, where the number is not enough.
        gaps: What slices at uneven distances mean: a missing file, or a series that is meant to be so. Then masks with
            a grid of their own have to have the same slices, and contours find theirs by their place.
        tilt: What a stack that is sheared means, as of a tilted gantry: its voxels are no boxes.
        localizers: What slices mean that run another way than the others, or are localizers.
        burned_in: What images mean whose header says that text is burned into them, which may name a patient.

    Raises:
        UserError: A file is damaged, or the slices are not one volume; see the options.
    """
    files = series_in(path, series, series_uid)
    with PixelDecoder() as decoder:
        slices = _slices_of(files, decoder, role, burned_in)
    stack = _stacked(path, slices, localizers)
    return _picture(path, slices, role) if stack is None else stack.volume(gaps, tilt)


@dataclass(frozen=True)
class Layout:
    """How the slices of a series lie, without their pixels.

    Attributes:
        slices: File, number of the frame in it, and slope and intercept of each slice, in the order of their places.
        shape: (X, Y, Z): columns, rows and slices.
        affine: (4, 4) from an index (x, y, z) to mm in NIfTI's frame.
        even: Whether the slices lie at even distances.
        frame: Frame of reference.
    """

    slices: tuple[tuple[Path, int, tuple[float, float]], ...]
    shape: tuple[int, int, int]
    affine: np.ndarray
    even: bool
    frame: str | None


def lay_out(
    path: Path,
    series: int | None = None,
    series_uid: str | None = None,
    gaps: str = "error",
    tilt: str = "error",
    localizers: str = "error",
    burned_in: str = "refuse",
) -> Layout | None:
    """Read only the headers of a series; None for pictures without a place. See `read_dicom` for options and errors."""
    stack = _stacked(path, _slices_of(series_in(path, series, series_uid), None, "image", burned_in), localizers)
    if stack is None:
        return None
    affine, places = stack.place(gaps, tilt)
    rows, columns = stack.slices[0].pixels.shape[:2]
    slices = tuple((item.path, item.number, item.scale) for item in stack.slices)
    return Layout(slices, (columns, rows, len(slices)), affine, places is None, stack.slices[0].frame or None)


@register_drawing(FOLDER, ".dcm", ".dicom", ".ima", "")
def read_dicom_drawing(
    path: Path, ground: Ground, match: Match = "frame", fraction: float = 0.5, regions: list[str] | None = None
) -> Drawing:
    """Read what was drawn on an image: segments (SEG), contours (RTSTRUCT), or a series that holds labels.

    Args:
        path: A file, or a folder with one SEG, one RTSTRUCT or one series.
        ground: The image.
        match: Whether segments and contours have to name the image's frame of reference or series, or whether it is
            enough that they lie on it: then it is the user who knows that both share their coordinates.
        fraction: A voxel is inside a fractional segment from this part of its highest value on.
        regions: Names of the only segments or regions that are read, ``*`` being any text; null reads all. A damaged
            one that nobody asked for is no hindrance then.

    Raises:
        UserError: The file is damaged, or does not lie on the image.
    """
    headers = headers_of(path)
    drawn: list[Header] = [header for header in headers if header.kind in ("seg", "rtstruct")]
    if len(drawn) > 1:
        raise UserError(f"{path}: holds {len(drawn)} segmentations or sets of contours: name one file, or several by *")
    if not drawn:  # a series of labels; whether it fits on the image shows when they are compared
        volume = read(path, "mask", gaps="allow", tilt="allow", burned_in="allow")
        return Drawing((Layer(volume.array, name=path.name.partition(".")[0]),), volume=volume)
    file = drawn[0].path
    with reading(file):
        if drawn[0].kind == "rtstruct":
            return read_rtstruct(file, ground, match, regions)
        return read_seg(file, ground, match, fraction, regions)


@dataclass(frozen=True)
class _Slice:
    """One slice as it was read.

    Attributes:
        path: Its file.
        number: Which frame of the file it is, from 0.
        pixels: (R, C) stored values, or (R, C, 3); all 0 where only the header was read.
        scale: Slope and intercept of its values.
        plane: Where it lies, or None.
        frame: Frame of reference.
        localizer: Whether it calls itself one.
        thickness: Distance to a neighbour that is not there, in mm.
        spacing: (row, column) in mm of a picture, or None.
    """

    path: Path
    number: int
    pixels: np.ndarray
    scale: tuple[float, float]
    plane: Plane | None
    frame: str
    localizer: bool
    thickness: float
    spacing: tuple[float, float] | None


def _slices_of(files: Sequence[Path], decoder: PixelDecoder | None, role: Role, burned_in: str) -> list[_Slice]:
    """Read files, or, without a decoder, only their headers."""
    slices: list[_Slice] = []
    for file in files:
        with reading(file):
            slices += _slices_in(file, decoder, role, burned_in)
    return slices


def _slices_in(path: Path, decoder: PixelDecoder | None, role: Role, burned_in: str) -> list[_Slice]:
    """Read one file."""
    dataset = open_dicom(path, _PLACES if decoder is None else None)
    if burned_in == "refuse" and str(dataset.get("BurnedInAnnotation") or "").strip().upper() == "YES":
        raise UserError(
            f"{path}: its header says that text is burned into the image, which may name the patient: leave it out, or "
            "look at it and set reader: {burned_in: allow}"
        )
    pixels = blank(dataset) if decoder is None else picture(dataset, decoder, path, role)
    between = number_in(dataset, "SpacingBetweenSlices", path) or number_in(dataset, "SliceThickness", path)
    kinds = dataset.get("ImageType") or ()
    return [
        _Slice(
            path=path,
            number=number,
            pixels=frame,
            scale=scale_of(dataset, number, path) if frame.ndim == 2 else (1.0, 0.0),
            plane=plane_of(dataset, number, path),
            frame=str(dataset.get("FrameOfReferenceUID") or ""),
            localizer="LOCALIZER" in kinds,
            thickness=abs(between or 1.0),
            spacing=_picture_spacing(dataset, path),
        )
        for number, frame in enumerate(pixels)
    ]


_PLACES = (
    "BurnedInAnnotation",
    "Columns",
    "FrameOfReferenceUID",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "ImagerPixelSpacing",
    "ModalityLUTSequence",
    "NumberOfFrames",
    "PerFrameFunctionalGroupsSequence",
    "PhotometricInterpretation",
    "PixelSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "Rows",
    "SamplesPerPixel",
    "SharedFunctionalGroupsSequence",
    "SliceThickness",
    "SpacingBetweenSlices",
)
"""What of a header says how the slices lie and what their values mean."""


def _stacked(path: Path, slices: list[_Slice], localizers: str) -> _Stack | None:
    """Stack slices; None if none of them has a place."""
    placed = [item for item in slices if item.plane is not None]
    if 0 < len(placed) < len(slices):
        stray = next(item for item in slices if item.plane is None)
        raise UserError(f"{stray.path}: does not say where it lies, as others of its series do: leave it out")
    return _Stack(path, _one_way(placed, localizers)) if placed else None


def _picture_spacing(dataset: Dataset, path: Path) -> tuple[float, float] | None:
    for name in ("PixelSpacing", "ImagerPixelSpacing"):
        found = numbers(dataset, name, 2, path)
        if found is not None and found.min() > 0:
            return float(found[0]), float(found[1])
    return None


def _picture(path: Path, slices: Sequence[_Slice], role: Role) -> Volume:
    """Return one picture, or the frames of one file."""
    files = {item.path for item in slices}
    if len(files) > 1:
        raise UserError(
            f"{path}: its {len(files)} {role}s do not say where they lie, so they are no volume: make each file a case"
        )
    array = rescale([item.pixels for item in slices], [item.scale for item in slices])
    spacing = slices[0].spacing
    return Volume(array, None if spacing is None else (1.0, *spacing), flat=True, files=tuple(files))


def _one_way(slices: list[_Slice], localizers: str) -> list[_Slice]:
    """Return the slices that run the same way as most."""
    ways: list[tuple[np.ndarray, list[_Slice]]] = []
    for item in slices:
        assert item.plane is not None
        rows, columns = item.plane.along_row, item.plane.along_column
        way = np.concatenate([rows / np.linalg.norm(rows), columns / np.linalg.norm(columns)])
        same = next((group for known, group in ways if np.abs(known - way).max() < 1e-3), None)
        if same is None:
            ways.append((way, [item]))
        else:
            same.append(item)
    most = max((group for _, group in ways), key=len)
    scouts = sum(item.localizer for item in most)
    kept = [item for item in most if not item.localizer] if 0 < scouts < len(most) else most
    strays = [item for item in slices if not any(item is other for other in kept)]
    if not strays or localizers == "drop":
        return kept
    what = "is a localizer among other slices" if strays[0].localizer else "runs another way than the others"
    raise UserError(
        f"{strays[0].path}: {what} of its series ({len(strays)} of {len(slices)}): leave such slices out by "
        "reader: {localizers: drop}"
    )


class _Stack:
    """Slices that run the same way, in the order of their places."""

    def __init__(self, path: Path, slices: Sequence[_Slice]) -> None:
        planes = [item.plane for item in slices if item.plane is not None]
        self.path = path
        depths = np.array([plane.position @ planes[0].normal for plane in planes])
        order = np.argsort(depths, kind="stable")
        self.slices = [slices[number] for number in order]
        self.planes = [planes[number] for number in order]
        self.depths = depths[order]
        self._check_alike()
        self._check_apart()

    def place(self, gaps: str, tilt: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the affine of the stack, and where its slices lie in mean steps; None where they lie evenly."""
        first, count = self.planes[0], len(self.planes)
        # From the first slice to the last: the corners of the volume are where they are, whatever the steps between.
        step = first.normal * self.slices[0].thickness
        if count > 1:
            step = np.round((self.planes[-1].position - first.position) / (count - 1), 9)
        affine = np.eye(4)
        affine[:3] = np.stack([first.along_row, first.along_column, step, first.position], axis=1) * RAS[:, None]
        self._check_shear(step, tilt)
        return affine, self._places(gaps)

    def volume(self, gaps: str, tilt: str) -> Volume:
        """Return the slices as a volume in LPS order."""
        affine, places = self.place(gaps, tilt)
        array = rescale([item.pixels for item in self.slices], [item.scale for item in self.slices])
        stacked = array.transpose(2, 1, 0, *range(3, array.ndim))
        turned = turn_to_lps(self.path, stacked, affine)
        frame = self.slices[0].frame or None
        files = tuple(dict.fromkeys(item.path for item in self.slices))
        if places is None:
            return Volume(turned.array, turned.spacing, turned.affine, frame=frame, files=files)
        return Uneven(
            turned.array, turned.spacing, turned.affine, frame=frame, files=files, stacked=affine, places=places
        )

    def _check_alike(self) -> None:
        """Raise unless all slices have the same size, pixel distances and frame of reference."""
        first, plane = self.slices[0], self.planes[0]
        for item, other in zip(self.slices, self.planes, strict=True):
            if item.pixels.shape != first.pixels.shape:
                sizes = f"{item.pixels.shape} and {first.pixels.shape} pixels"
                raise UserError(f"{item.path}: its series holds slices of {sizes}: separate them")
            steps = np.abs([other.along_row - plane.along_row, other.along_column - plane.along_column])
            if steps.max() > 1e-3 * np.linalg.norm(plane.along_row):
                raise UserError(
                    f"{item.path}: the distances of its pixels differ from {first.path.name}'s: separate them"
                )
            if item.frame != first.frame:
                raise UserError(
                    f"{item.path}: lies in another frame of reference than {first.path.name}: separate them"
                )

    def _check_apart(self) -> None:
        """Raise if two slices lie in one place."""
        if len(self.depths) < 2:
            return
        steps = np.diff(self.depths)
        number = int(steps.argmin())
        if steps[number] < max(1e-3, 0.01 * float(np.median(steps))):
            one, two = self.slices[number].path, self.slices[number + 1].path
            same = Counter(np.round(self.depths, 3)).most_common(1)[0][1]
            raise UserError(
                f"{self.path}: slices share a place (up to {max(same, 2)}, as {one.name} and {two.name}), as in a "
                "series over time or with several echoes: put those of one volume into a folder of their own"
            )

    def _check_shear(self, step: np.ndarray, tilt: str) -> None:
        """Raise if the slices are shifted against each other."""
        pixel = min(np.linalg.norm(self.planes[0].along_row), np.linalg.norm(self.planes[0].along_column))
        normal = self.planes[0].normal
        # How far each slice lies from the line through the first one, along the step.
        moved = np.array([plane.position - self.planes[0].position for plane in self.planes])
        line = np.outer(moved @ normal / (step @ normal), step)
        off = np.linalg.norm(moved - line, axis=1)
        if off.max() > pixel / 2:
            name = self.slices[int(off.argmax())].path.name
            raise UserError(
                f"{self.path}: {name} is shifted sideways by {off.max():.2f} mm against the others: leave it out"
            )
        drift = np.linalg.norm(moved[-1] - moved[-1] @ normal * normal)
        if drift > pixel / 2 and tilt == "error":
            angle = np.degrees(np.arccos(abs(step @ normal) / np.linalg.norm(step)))
            raise UserError(
                f"{self.path}: its slices are tilted by {angle:.1f} degrees against the stack, so its voxels are no "
                "boxes: resample it, or set reader: {tilt: allow} to take the slices as they are"
            )

    def _places(self, gaps: str) -> np.ndarray | None:
        """Return where the slices lie in mean steps, or None where they lie evenly, but for rounding."""
        if len(self.depths) < 3:
            return None
        steps = np.diff(self.depths)
        usual = float(np.sort(steps)[(len(steps) - 1) // 2])
        places = (self.depths - self.depths[0]) / (self.depths[-1] - self.depths[0]) * len(steps)
        # Positions are often rounded to 0.1 mm. A missing slice moves others by half a step at least.
        if np.abs(places - np.arange(len(places))).max() * steps.mean() <= min(max(0.1 * usual, 0.1), 0.2 * usual):
            return None
        if gaps == "error":
            number = int(np.abs(steps - usual).argmax())
            raise UserError(
                f"{self.path}: {steps[number]:.2f} mm lie between {self.slices[number].path.name} and "
                f"{self.slices[number + 1].path.name}, {usual:.2f} mm between most slices: is a file missing? If it is "
                "meant so, set reader: {gaps: allow}"
            )
        return places
