"""Scans: the slices of any volume, or the frames of a video, read one by one in whatever order they are needed.

A slice looks exactly as in shards that are built from the same file: turned to LPS, cut along the same axis, and
mapped by the same intensity rule. What is held in memory:

- NIfTI (``.nii``): a slice; the file is mapped. ``.nii.gz`` is unpacked once into a temporary file as large as the
  volume, in the folder that TMPDIR names.
- A DICOM series: the headers and a slice (of files with several frames, one file). Cut along another axis than it was
  taken along, its values go through a temporary file.
- A folder of pictures: a frame.
- NRRD, MetaImage, npz, a TIFF or GIF with several pages, DICOM without places: the whole, at the file's own dtype.

Shapes: D slices, H W native height and width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from data_shards.errors import UserError, counted, nearest
from data_shards.preprocessing import Axis, Intensity, Rescale
from data_shards.readers import Drawing, Ground, Volume, check_options, own_options, read_drawing
from data_shards.readers.base import known_readers, reader_for
from data_shards.readers.dicom import lay_out, read_dicom
from data_shards.readers.dicom_files import SUFFIXES, has_preamble
from data_shards.readers.images import read_images
from data_shards.readers.nifti import read_nifti
from trainer.volumes import scan_sources as sources
from trainer.volumes.scan_grid import Grid, volume_axis
from trainer.volumes.scan_intensity import fit, parse_intensity

Spacing = tuple[float, float, float]
RECORD = ".predict.json"
"""How the name of a record ends that `trainer predict` writes beside a volume's masks."""


class Scan:
    """A volume cut along one axis, or a video; a `Stack`. Use it as a context manager, or close it.

    Slice n lies at index n of the LPS volume along z, y or x, as `slice_index` of a shard's samples does.

    Args:
        source: Its slices.
        fill: Takes the place of values that are no numbers; None refuses them.
        spacing: Distances (z, y, x) in mm that win over the source's.

    Attributes:
        place: Where its voxels lie.
        path: The file or folder.
        name: The same as text, for messages.
        axis: Along which it is cut.
        size: Native (H, W).
        volume_spacing: Distances (z, y, x) of the volume's voxels in mm; None where they are not known. Between frames,
            1 stands for what has no meaning.
        flat: Whether the slices are pictures or frames.
        rescale: The map of intensities, fitted to the whole volume.
        notes: What its user should be told, one line each.
        label_names: Names by value, of a label map that has them.
    """

    def __init__(self, source: sources.Source, fill: float | None = None, spacing: Spacing | None = None) -> None:
        self._source, self._fill, self._given = source, fill, spacing is not None
        self.place = source.place
        self.path, self.axis, self.flat, self.size = self.grid.path, self.place.axis, self.place.flat, source.size
        self.name = str(self.path)
        self.volume_spacing = spacing or self.place.spacing
        self.rescale = Rescale("none")
        self.notes: tuple[str, ...] = ()
        self.label_names: Mapping[int, str] = {}

    @property
    def spacing(self) -> Spacing | None:
        """Millimetres between slices, rows and columns."""
        if self.volume_spacing is None:
            return None
        first = volume_axis(self.axis)
        row, column = (step for number, step in enumerate(self.volume_spacing) if number != first)
        return self.volume_spacing[first], row, column

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the slices."""
        layout = self.place.layout
        if layout is not None:
            return tuple(dict.fromkeys(file for file, _, _ in layout.slices))
        return self.place.files or (self.path,)

    @property
    def grid(self) -> Grid:
        """How the file orders its voxels."""
        return self.place.grid

    def __len__(self) -> int:
        return self._source.count

    def __enter__(self) -> Scan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of files, temporary ones included, and processes."""
        self._source.close()

    def raw(self, number: int) -> np.ndarray:
        """Read a slice before the intensity rule: (H, W) or (H, W, 3).

        Raises:
            UserError: There is no such slice, it is damaged, or it holds what is no number.
        """
        if not 0 <= number < len(self):
            raise UserError(f"{self.name}: has no slice {number}, only 0 to {len(self) - 1}")
        values = self._source.slice(number)
        if values.dtype.kind != "f":
            return values
        finite = np.isfinite(values)
        bad = values.size - int(finite.sum())
        if not bad:
            return values
        if self._fill is None:
            raise UserError(
                f"{self.name}: slice {number}: {bad} of its {values.size} values are no numbers (NaN or infinite): "
                "mend the file, or give --fill VALUE to put a number in their place"
            )
        return np.where(finite, values, values.dtype.type(self._fill))

    def image(self, number: int) -> Tensor:
        """Read a slice as a model's preprocessing takes it: (1, H, W), or (3, H, W) in colours; see `raw`."""
        image = self.rescale.apply(self.raw(number))
        channels_first = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
        return torch.from_numpy(channels_first.copy(order="C"))  # a copy, because a mapped file may not be written to

    def fit(self, rule: Intensity | None) -> None:
        """Fit an intensity rule to the whole volume, and see that all its values are numbers."""
        self.rescale, note = fit(rule, self._slices)
        self.notes = (*self.notes, f"{self.name}: {note}") if note else self.notes
        if self._source.slice(0).dtype.kind == "f" and self.rescale.kind in ("window", "none"):
            for _ in self._slices():  # other rules have looked at every slice
                pass

    def _slices(self) -> Iterator[np.ndarray]:
        return (self.raw(number) for number in range(len(self)))

    def require_slices(self, count: int) -> None:
        """Raise a `UserError` if there are fewer slices than needed."""
        if len(self) < count:
            raise UserError(
                f"{self.name}: has {counted(len(self), 'frame' if self.flat else 'slice')}, {count} are needed: "
                "name a whole volume or video" + ("" if self.flat else ", or cut it along another axis")
            )

    def require_spacing(self, why: str) -> Spacing:
        """Return the spacing (slices, rows, columns) in mm.

        Args:
            why: What needs it, for the message: "a surface distance in 3D".

        Raises:
            UserError: It is not known.
        """
        if self.spacing is None or (self.flat and len(self) > 1 and not self._given):
            raise UserError(
                f"{self.name}: does not say how far apart its voxels are, which {why} needs: give --spacing z,y,x in mm"
            )
        return self.spacing


def open_scan(
    path: str | Path,
    *,
    axis: Axis = "axial",
    intensity: str | Mapping[str, Any] | Intensity | None = None,
    reader_options: Mapping[str, Any] | None = None,
    spacing: Spacing | None = None,
    fill: float | None = None,
) -> Scan:
    """Open a volume or video: NIfTI, NRRD, MetaImage, DICOM, npz, a TIFF, or a folder of pictures in natural order.

    Args:
        path: The file or folder.
        axis: Along which to cut; pictures and frames have one axis only.
        intensity: See `parse_intensity`; None takes 8-bit images as they are, all else between its percentiles.
        reader_options: As ``reader`` in a build spec.
        spacing: Distances (z, y, x) in mm of the volume's voxels, for files that do not say.
        fill: Takes the place of NaN and infinity.

    Raises:
        UserError: The file is missing, damaged or no volume; an option is wrong; a value is no number.
    """
    path, rule = Path(path).expanduser(), parse_intensity(intensity)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: correct the path")
    if axis not in get_args(Axis):
        raise UserError(f"--axis {axis}: is no axis{nearest(axis, get_args(Axis))}")
    if spacing is not None:
        _check_spacing(spacing, ",".join(f"{step:g}" for step in spacing))
    if fill is not None and not math.isfinite(fill):
        raise UserError(f"--fill {fill}: is no number that could take the place of others")
    source = _source(path, axis, dict(reader_options or {}))
    scan = Scan(source, fill, spacing)
    own = source.place.spacing
    if spacing is not None and own is not None and not scan.flat and not np.allclose(spacing, own, rtol=1e-3):
        said = ",".join(f"{step:g}" for step in own)
        scan.notes = (f"{path}: says itself that its voxels are {said} mm apart (z,y,x); --spacing wins",)
    if source.place.files and source.place.flat and path.is_dir():
        scan.notes = (*scan.notes, *_left_out(path, len(source.place.files)))
    try:
        scan.fit(rule)
    except BaseException:
        scan.close()
        raise
    return scan


def _source(path: Path, axis: Axis, options: dict[str, Any]) -> sources.Source:
    """Open what a path names."""
    pictures = _pictures_in(path) if path.is_dir() else []
    check_options(pictures[0] if pictures else path, [], options)
    if pictures:
        return sources.frames(path, pictures, options)
    reader = reader_for(path)
    if reader is read_nifti:
        return sources.nifti(path, axis, **options)
    layout = lay_out(path, **options) if reader is read_dicom else None
    if layout is None:
        return sources.whole(path, axis, options)
    grid = Grid(path, layout.shape, layout.affine, layout.even)
    return sources.series(sources.Place(grid, axis, grid.spacing(), layout=layout))


def _left_out(folder: Path, count: int) -> list[str]:
    """What of a folder is no frame of `count`, in words."""
    made = sorted((item.name for item in made_in(folder)), key=lambda name: sources.natural(Path(name)))
    left = len([item for item in folder.iterdir() if not item.name.startswith(".")]) - count - len(made)
    notes = [f"{folder}: {counted(left, 'entry', 'entries')} of it that are no pictures: ignored"] if left else []
    if made:
        shown = ", ".join(made[:3]) + (f" and {len(made) - 3} more" if len(made) > 3 else "")
        notes.append(f"{folder}: {shown}: made by `trainer predict`, as *{RECORD} beside it says: no frame, left out")
    return notes


def made_in(folder: Path) -> set[Path]:
    """The pictures in a folder that `trainer predict` has put there: those that a record beside them names.

    A picture of a record's own name is one too, also where the record does not say so.
    """
    found = set()
    for record in folder.glob(f"*{RECORD}"):
        found.add(folder / (record.name.removesuffix(RECORD) + ".png"))
        try:
            content = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        named = content.get("files") if isinstance(content, dict) else None
        places = [Path(name) for name in named if isinstance(name, str)] if isinstance(named, list) else []
        homes = {place.parent for place in places if place.name == record.name}  # where the folder was called something
        found |= {folder / place.name for place in places if place.parent in homes and place.suffix.lower() == ".png"}
    return {path for path in found if path.is_file()}


def _pictures_in(folder: Path) -> list[Path]:
    """Return the pictures in a folder in natural order, but not our own; none where it holds DICOM.

    Raises:
        UserError: It holds both, or neither.
    """
    suffixes = tuple(suffix for suffix, reader in known_readers()[0].items() if reader is read_images)
    made = made_in(folder)
    files = [item for item in folder.iterdir() if item.is_file() and not item.name.startswith(".") and item not in made]
    pictures = [item for item in files if item.name.lower().endswith(suffixes)]
    others = [item for item in files if item not in set(pictures)]
    dicom = any(item.suffix.lower() in SUFFIXES or has_preamble(item) for item in others)
    if pictures and dicom:
        raise UserError(f"{folder}: holds both pictures and DICOM: give each a folder of its own")
    if not pictures and not dicom:
        raise UserError(f"{folder}: holds neither pictures nor DICOM: name the folder that holds the files themselves")
    return sorted(pictures, key=sources.natural)


def parse_spacing(text: str) -> Spacing:
    """Read distances ``z,y,x`` in mm.

    Raises:
        UserError: They are not three numbers above 0.
    """
    try:
        z, y, x = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--spacing {text}: three numbers are needed, z,y,x in mm, as in 5,0.7,0.7") from None
    _check_spacing((z, y, x), text)
    return z, y, x


def _check_spacing(spacing: Spacing, text: str) -> None:
    if not all(math.isfinite(step) and step > 0 for step in spacing):
        raise UserError(f"--spacing {text}: distances in mm are above 0")


def open_labels(path: str | Path, scan: Scan, reader_options: Mapping[str, Any] | None = None) -> Scan:
    """Read what was drawn on a scan, whole, and cut it alike: `raw` gives (H, W) whole numbers, 0 where nothing is.

    Label maps keep their values. Segments of a DICOM SEG, regions of an RTSTRUCT and the like are numbered from 1 in
    the order of the file, see `Scan.label_names`; where they overlap the first is seen. A folder of pictures holds
    one mask for each frame, in the same order.

    Args:
        path: The file or folder.
        scan: What it lies on.
        reader_options: As ``reader`` in a build spec.

    Raises:
        UserError: It cannot be read, has another shape or lies elsewhere, or holds fractions or colours.
    """
    path, options = Path(path).expanduser(), dict(reader_options or {})
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: correct the path")
    ground, names = scan_ground(scan), {}
    pictures = _pictures_in(path) if path.is_dir() and scan.flat else []
    if pictures:
        array = _stack_masks(path, pictures, scan, options)
    else:
        check_options(scan.path, [path], options)
        drawing = read_drawing(path, Ground(scan.path, ground), **own_options(path, "mask", options))
        if drawing.volume is None:
            array = _painted(drawing, ground.array.shape)
            names = {number: layer.name for number, layer in enumerate(drawing.layers, start=1)}
        else:
            array = drawing.volume.array
            _check_fits(path, drawing.volume, ground, scan)
    if array.ndim != 3 or (array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.rint(array))).all()):
        raise UserError(f"{path}: is no label map: its values are {'colours' if array.ndim != 3 else 'fractions'}")
    array = array.astype(np.int64) if array.dtype.kind == "f" else array
    labels = Scan(sources.Whole(sources.Place(Grid(path, ground.array.shape[2::-1]), scan.axis, None), array))
    labels.label_names, labels.notes = names, tuple(_left_out(path, len(pictures)) if pictures else ())
    return labels


def scan_ground(scan: Scan) -> Volume:
    """Return a volume of zeros in a scan's place, on which drawings can be laid."""
    layout = scan.place.layout
    return scan.grid.blank(scan.flat, None if layout is None else layout.frame, scan.files)


def _check_fits(path: Path, labels: Volume, ground: Volume, scan: Scan) -> None:
    """Raise unless a label map has a scan's shape and place."""
    if labels.array.shape[:3] != ground.array.shape:
        raise UserError(
            f"{path}: shape {labels.array.shape[:3]} (z, y, x) differs from {ground.array.shape} of {scan.name}: "
            "resample it onto that, or correct the pairing"
        )
    apart = ground.apart(labels)
    if apart and ground.affine is not None and apart > np.linalg.norm(ground.affine[:3, :3], axis=0).min() / 2:
        raise UserError(
            f"{path}: lies elsewhere than {scan.name}: their headers put the same voxel up to {apart:.1f} mm apart: "
            "resample it onto that, or correct the pairing"
        )


def _painted(drawing: Drawing, shape: tuple[int, ...]) -> np.ndarray:
    """Number the layers of a drawing in one volume (Z, Y, X); the first is on top."""
    volume = np.zeros(shape, np.min_scalar_type(len(drawing.layers)))
    for number in range(len(drawing.layers), 0, -1):
        layer = drawing.layers[number - 1]
        box = tuple(slice(low, low + side) for low, side in zip(layer.origin, layer.values.shape[:3], strict=True))
        volume[box][layer.values != 0] = number
    return volume


def _stack_masks(path: Path, files: Sequence[Path], scan: Scan, options: Mapping[str, Any]) -> np.ndarray:
    """Read one mask for each frame."""
    if len(files) != len(scan):
        raise UserError(f"{path}: holds {len(files)} masks, {scan.name} {len(scan)} frames: one each is needed")
    array: np.ndarray | None = None
    for number, file in enumerate(files):
        mask = sources.one_frame(file, options, "mask")
        if mask.shape != scan.size:
            raise UserError(f"{file}: has shape {mask.shape}, the frames of {scan.name} {scan.size}: save it like them")
        array = np.zeros((len(files), *scan.size), mask.dtype) if array is None else array
        if np.result_type(array, mask) != array.dtype:
            array = array.astype(np.result_type(array, mask))
        array[number] = mask
    assert array is not None  # `_pictures_in` found some
    return array
