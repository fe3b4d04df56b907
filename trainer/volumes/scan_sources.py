"""Where the slices of a scan come from: files that are mapped into memory, read one by one, or held whole.

Shapes: I, J, K as a file orders its axes, the first running fastest; D slices, H W height and width.
"""

from __future__ import annotations

import errno
import gzip
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_shards.errors import UserError
from data_shards.preprocessing import Axis, slices_of
from data_shards.readers import Windowed, read
from data_shards.readers.axes import pick_channels
from data_shards.readers.base import Role, guarded
from data_shards.readers.dicom import Layout
from data_shards.readers.dicom_files import open_dicom, reading
from data_shards.readers.dicom_pixels import PixelDecoder, picture, rescale
from data_shards.readers.nifti import quiet
from trainer.volumes.scan_grid import Grid


@dataclass(frozen=True)
class Place:
    """Where the voxels of a source lie.

    Attributes:
        grid: How the file orders them.
        axis: Along which the slices are cut.
        spacing: Distances (z, y, x) of the volume's voxels in mm, or None.
        flat: Whether the slices are pictures, which have no anatomical axes.
        files: The one file of each slice, where there is one for each.
        layout: How the slices of a DICOM series lie.
    """

    grid: Grid
    axis: Axis
    spacing: tuple[float, float, float] | None
    flat: bool = False
    files: tuple[Path, ...] = ()
    layout: Layout | None = None


class Source(ABC):
    """The slices of a volume along one axis, before any intensity rule."""

    def __init__(self, place: Place) -> None:
        self.place = place
        count, height, width = place.grid.slices(place.grid.zeros(), place.axis).shape
        self.count, self.size = count, (height, width)

    @abstractmethod
    def slice(self, number: int) -> np.ndarray:
        """Read a slice (H, W) or (H, W, 3), in the machine's byte order.

        Raises:
            UserError: It is damaged.
        """

    def close(self) -> None:  # noqa: B027  # most have nothing to do
        """Let go of files and processes."""


class Whole(Source):
    """A volume in memory."""

    def __init__(self, place: Place, array: np.ndarray) -> None:
        super().__init__(place)
        self._slices = slices_of(array, place.axis)

    def slice(self, number: int) -> np.ndarray:
        """Return a slice; see `Source`."""
        return self._slices[number]


class Mapped(Source):
    """An uncompressed file, of which the system holds in memory as much as it has room for.

    Args:
        place: Where its voxels lie.
        array: (I, J, K, …) mapped.
        finish: Makes a slice (H, W, …) of the file's values one of numbers.
    """

    def __init__(self, place: Place, array: np.ndarray, finish: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__(place)
        self._slices, self._finish = place.grid.slices(array, place.axis), finish

    def slice(self, number: int) -> np.ndarray:
        """Read a slice; see `Source`."""
        return self._finish(np.array(self._slices[number], order="C"))

    def close(self) -> None:
        """Unmap the file; a temporary one is gone then."""
        self._slices = np.zeros((0, 0, 0))


class Series(Source):
    """A DICOM series whose slices are asked for as they were taken: each is decoded when it is asked for.

    Of files with several frames the last one read is held.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        assert place.layout is not None
        self._layout, self._decoder = place.layout, PixelDecoder()
        last = place.grid.shape[2]
        order = np.broadcast_to(np.arange(last), place.grid.shape)
        self._order = place.grid.slices(order, place.axis)[:, 0, 0]
        self._held: tuple[Path, np.ndarray] | None = None

    def slice(self, number: int) -> np.ndarray:
        """Decode a slice; see `Source`."""
        stored = self.stored(int(self._order[number]))
        box = stored[None].transpose(2, 1, 0, *range(3, stored.ndim + 1))
        return np.ascontiguousarray(self.place.grid.slices(box, self.place.axis)[0])

    def stored(self, place: int) -> np.ndarray:
        """Decode slice `place` of the stack: (J, I) or (J, I, 3), in the unit of the modality."""
        path, frame, scale = self._layout.slices[place]
        if self._held is None or self._held[0] != path:
            with reading(path):
                self._held = path, picture(open_dicom(path), self._decoder, path, "image")
        return rescale([self._held[1][frame]], [scale])[0]

    def close(self) -> None:
        """End the process that decodes."""
        self._decoder.__exit__(None, None, None)
        self._held = None


class Frames(Source):
    """A folder of pictures, each read when it is asked for."""

    def __init__(self, place: Place, options: Mapping[str, Any]) -> None:
        super().__init__(place)
        self._options = dict(options)

    def slice(self, number: int) -> np.ndarray:
        """Read a frame; see `Source`."""
        path = self.place.files[number]
        frame = one_frame(path, self._options)
        if frame.shape[:2] != self.size:
            height, width = self.size
            raise UserError(
                f"{path}: has {frame.shape[1]} x {frame.shape[0]} pixels, the first frame {width} x {height}: frames "
                "of one video have one size: leave it out or resize it"
            )
        return frame


def whole(path: Path, axis: Axis, options: Mapping[str, Any]) -> Source:
    """Read a file that only comes whole: NRRD, MetaImage, npz, a TIFF or GIF with its pages, DICOM without places."""
    volume = read(path, "image", **options)
    if isinstance(volume.array, Windowed):
        raise UserError(f"{path}: is too large for one slice: cut it, or take a smaller level by reader: {{level: 1}}")
    grid = Grid(path, volume.array.shape[2::-1])
    if volume.affine is not None:
        grid = _grid_of_itk(path)
    return Whole(Place(grid, "axial" if volume.flat else axis, volume.spacing, volume.flat), volume.array)


def _grid_of_itk(path: Path) -> Grid:
    """Return the grid of an NRRD or MetaImage that has been read: ITK's axes run to the left, back and head."""
    import SimpleITK as sitk  # noqa: N813  # its users know it by this name

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
    affine[:3, 3] = reader.GetOrigin()
    i, j, k = reader.GetSize()
    return Grid(path, (i, j, k), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


def nifti(path: Path, axis: Axis, channels: list[int] | None = None) -> Source:
    """Map a NIfTI file; a compressed one is unpacked into a temporary file first, which also checks it."""
    return guarded(path, lambda: _nifti(path, axis, channels))


def _nifti(path: Path, axis: Axis, channels: list[int] | None) -> Source:
    import nibabel

    with quiet(), _unpacked(path) as file:
        size = file.read(4)
        second = 540 in (int.from_bytes(size, "little"), int.from_bytes(size, "big"))
        kind = nibabel.Nifti2Header if second else nibabel.Nifti1Header
        file.seek(0)
        stored = kind.from_fileobj(file, check=False)
        file.seek(0)
        header = kind.from_fileobj(file)  # mended where it can be
        dtype, shape = header.get_data_dtype(), tuple(int(side) for side in header.get_data_shape())
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        several = len(shape) == 4 and channels is not None
        if not (len(shape) == 3 or several) or min(shape) < 1:
            hint = "" if len(shape) != 4 else ", or choose one, as in reader: {channels: [0]}"
            raise UserError(
                f"{path}: has shape {shape}; a volume of three dimensions is needed: split the series in time{hint}"
            )
        if not dtype.names and (dtype.kind not in "biuf" or dtype.itemsize > 8):
            raise UserError(f"{path}: holds values of type {dtype}; plain numbers are needed")
        array = np.memmap(file, dtype, "r", header.get_data_offset(), shape, "F")
    slope, intercept = header.get_slope_inter()
    scale = None if slope in (None, 1) and not intercept else (slope or 1.0, intercept or 0.0)
    grid = Grid(path, (shape[0], shape[1], shape[2]), header.get_best_affine())
    zooms = np.asarray(stored["pixdim"][1:4], dtype=float)
    known = int(stored["sform_code"]) > 0 or (np.isfinite(zooms).all() and (zooms != 0).all())
    place = Place(grid, axis, grid.spacing() if known else None)
    return Mapped(place, array, lambda values: _numbers(path, values, scale, channels))


def _numbers(
    path: Path, values: np.ndarray, scale: tuple[float, float] | None, channels: list[int] | None
) -> np.ndarray:
    """Make stored values (H, W) or (H, W, C) of a NIfTI file numbers, as its reader does: scaled ones are float32."""
    from nibabel.volumeutils import apply_read_scaling

    if values.dtype.names:  # RGB is stored as a record of bytes
        values = np.stack([values[name] for name in values.dtype.names[:3]], axis=-1)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if scale is not None:
        values = apply_read_scaling(values, *scale).astype(np.float32)
    return values if channels is None or values.ndim == 2 else pick_channels(path, values, channels)


@contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, or what it unpacks to: a temporary file that vanishes with its last user."""
    if not path.name.lower().endswith(".gz"):
        with path.open("rb") as file:
            yield file
        return
    with scratch(path) as temporary:
        with gzip.open(path) as packed:  # read to the end, its checksum is compared
            shutil.copyfileobj(packed, temporary, 2**20)
        temporary.seek(0)
        yield temporary


@contextmanager
def scratch(path: Path, size: int = 0) -> Iterator[IO[bytes]]:
    """Open a temporary file without a name, for what does not fit into the memory.

    Args:
        path: What it is for, for messages.
        size: Bytes to reserve: a mapped file that finds the disk full ends the whole process.

    Raises:
        UserError: Its disk is full.
    """
    with tempfile.TemporaryFile(prefix="sam-trainer-") as file:
        try:
            file.truncate(size)
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            yield file
            file.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"{path}: needs a temporary file, for which {tempfile.gettempdir()} has no room: free some, or name "
                "another folder by the environment variable TMPDIR"
            ) from error


def series(place: Place) -> Source:
    """Read a DICOM series as its slices were taken; cut another way, its values go to a temporary file first."""
    source = Series(replace(place, axis=_own_axis(place.grid)))
    if source.place.axis == place.axis:
        return source
    try:
        return _spooled(place, source)
    finally:
        source.close()


def _own_axis(grid: Grid) -> Axis:
    """Return along which axis the slices of a stack (columns, rows, slices) were taken."""
    axes: tuple[Axis, ...] = ("sagittal", "coronal", "axial")
    return axes[int(grid.turn().orientation[2, 0])]


def _spooled(place: Place, source: Series) -> Source:
    """Copy all slices of a series into a temporary file."""
    count = place.grid.shape[2]
    dtype = source.stored(0).dtype
    while True:
        with scratch(place.grid.path) as file:
            for number in range(count):
                values = source.stored(number)
                wider = np.result_type(values, dtype)
                if wider != dtype:  # whole numbers so far, none any more: begin anew
                    dtype = wider
                    break
                file.write(values.astype(dtype).tobytes())
            else:
                file.flush()
                array = np.memmap(file, dtype, "r", 0, (count, *values.shape))
                stacked = array.transpose(2, 1, 0, *range(3, array.ndim))
                return Mapped(place, stacked, lambda part: part)


def frames(path: Path, files: Sequence[Path], options: Mapping[str, Any]) -> Source:
    """Take pictures as the frames of a video."""
    height, width = one_frame(files[0], options).shape[:2]
    return Frames(Place(Grid(path, (width, height, len(files))), "axial", None, True, tuple(files)), options)


def one_frame(path: Path, options: Mapping[str, Any], role: Role = "image") -> np.ndarray:
    """Read a picture (H, W) or (H, W, 3), or a mask.

    Raises:
        UserError: It cannot be read, or holds several pages.
    """
    volume = read(path, role, **options)
    if len(volume.array) != 1:
        raise UserError(f"{path}: holds {len(volume.array)} pages: give it by itself, or leave it out of the folder")
    return volume.array[0]


def natural(path: Path) -> tuple[Any, ...]:
    """Sort key of a file's name in which numbers count as numbers: frame2 comes before frame10."""
    parts = re.split(r"(\d+)", path.name.casefold())
    return (*((int(part), "") if part.isdecimal() else (-1, part) for part in parts), path.name)
