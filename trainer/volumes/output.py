"""Label maps in the geometry of the scan that they lie on.

The label map has the source's own array order, affine and orientation, so that it lies voxel by voxel on its file.
Masks are kept in a temporary file until all are there; the output is put in place whole or not at all.

Shapes: D slices, N objects, H W native height and width, I J K as the file orders its axes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from data_shards.errors import UserError
from trainer.volumes.output_dicom import check_dicom, write_dicom
from trainer.volumes.output_files import (
    Written,
    check_geometry,
    put_in_place,
    remove,
    write_itk,
    write_nifti,
    write_npz,
    write_picture,
    write_pictures,
)
from trainer.volumes.scan import Scan
from trainer.volumes.scan_sources import scratch

_MOST = 2**16 - 1
_WRITERS = {
    ".nii": write_nifti,
    ".nii.gz": write_nifti,
    ".nrrd": write_itk,
    ".mha": write_itk,
    ".dcm": write_dicom,
    ".npz": write_npz,
    ".png": write_picture,
    "": write_pictures,
}
"""By the output's suffix; without one it is a folder of pictures."""


def check_output(
    path: str | Path, scan: Scan, names: Sequence[str], *, separate: bool = False, overwrite: bool = False
) -> None:
    """See before any work that a label map can be written.

    Args:
        path: The file, or a folder for pictures.
        scan: What it lies on.
        names: Names of the N objects.
        separate: Whether each object gets a file of its own.
        overwrite: Whether files may be replaced.

    Raises:
        UserError: The format does not fit the scan, a package is missing, something is there already, or names are
            empty or double.
    """
    path = Path(path).expanduser()
    suffix = _suffix(path)
    if suffix in (".nii", ".nii.gz", ".nrrd", ".mha"):
        check_geometry(path, scan.grid, suffix)
    if suffix == ".png" and len(scan) > 1:
        raise UserError(
            f"{path}: a PNG holds one slice, {scan.name} has {len(scan)}: leave the suffix out for a folder of PNG"
        )
    if suffix == ".dcm":
        check_dicom(path, scan)
        if separate:
            raise UserError(f"{path}: a DICOM SEG holds each object by itself, overlaps too: leave --separate out")
    if not names or not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise UserError(f"{path}: objects need names, each another, got {', '.join(map(repr, names)) or 'none'}")
    files = _files(path, names, separate)
    if len(names) > _MOST:
        raise UserError(f"{path}: holds at most {_MOST} objects, got {len(names)}")
    if len(set(files)) < len(files):
        raise UserError(f"{path}: two of its objects' names make the same file name: give other names")
    _check_free([*files, *([] if suffix == ".dcm" else [_record(path)])], scan, overwrite)


def _check_free(files: Sequence[Path], scan: Scan, overwrite: bool) -> None:
    """Raise if a file is there already, cannot be there, or is the source."""
    sources = {item.resolve() for item in (scan.path, *scan.files)}
    for file in files:
        if file.resolve() in sources:
            raise UserError(f"{file}: is the scan itself: name another output")
        parent = next(folder for folder in file.parents if folder.exists())
        if not parent.is_dir():
            raise UserError(f"{file}: {parent} is a file: name another output")
        if file.is_dir() if file.suffix else file.is_file():
            raise UserError(f"{file}: is a {'folder' if file.is_dir() else 'file'}: name another output")
        if not overwrite and file.exists() and (file.is_file() or any(file.iterdir())):
            raise UserError(f"{file} is there already: give --overwrite, or another output")


class LabelWriter:
    """Takes the masks of a scan's slices in any order and writes them when it is closed. Use it as a context manager.

    On an error inside nothing is written. In a label map a voxel has one value: where objects overlap, the one with
    the higher score in that slice has it, and of equal ones, or without scores, the one that is named first. In a
    DICOM SEG, and in separate files, objects keep all their voxels.

    Args:
        path: The file; its suffix names the format: ``.nii``, ``.nii.gz``, ``.nrrd``, ``.mha``, ``.npz``, ``.dcm``
            (DICOM SEG, for DICOM series), ``.png`` (of a single picture); without one, a folder with a PNG for each
            slice.
        scan: What the masks lie on.
        names: Names of the N objects; object n has the value n + 1.
        separate: Write each object into a file of its own, ``PATH-NAME``.
        overwrite: Replace files that are there.

    Attributes:
        files: What was written, once it is: the label maps, and a JSON beside them with the names.

    Raises:
        UserError: See `check_output`.
    """

    def __init__(
        self, path: str | Path, scan: Scan, names: Sequence[str], *, separate: bool = False, overwrite: bool = False
    ) -> None:
        check_output(path, scan, names, separate=separate, overwrite=overwrite)
        self.path, self.scan, self.names = Path(path).expanduser(), scan, tuple(names)
        self.files: tuple[Path, ...] = ()
        self._suffix, self._separate = _suffix(self.path), separate
        self._apart = separate or self._suffix == ".dcm"
        self._contested: dict[int, int] = {}
        self._open = ExitStack()
        shape = (*scan.grid.shape, *((len(names),) if self._apart else ()))
        dtype = np.dtype(np.uint8 if self._apart or len(names) < 256 else np.uint16)
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        file = self._open.enter_context(scratch(self.path, size))
        # in this order NIfTI's values only need to be copied
        self._labels: np.ndarray = np.memmap(file, dtype, "r+", 0, shape, "F")
        self._slices = scan.grid.slices(self._labels, scan.axis)

    def __enter__(self) -> LabelWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._drop()

    @property
    def contested(self) -> int:
        """Voxels that several objects claim and one got."""
        return sum(self._contested.values())

    def put(self, number: int, masks: np.ndarray, scores: np.ndarray | None = None) -> None:
        """Keep the masks of a slice, in place of those that were given before.

        Args:
            number: Of the slice.
            masks: (N, H, W) bool.
            scores: (N,) decide where objects overlap.
        """
        masks = np.asarray(masks)
        if masks.shape != (len(self.names), *self.scan.size):
            raise ValueError(f"masks of shape {masks.shape}, expected {(len(self.names), *self.scan.size)}")
        masks = masks != 0
        if self._apart:
            self._slices[number] = np.moveaxis(masks, 0, -1)
            return
        self._contested[number] = int((masks.sum(axis=0) > 1).sum())
        values = np.zeros(len(masks)) if scores is None else np.asarray(scores, dtype=float)
        picture = np.zeros(self.scan.size, self._labels.dtype)
        for place in sorted(range(len(masks)), key=lambda place: (values[place], -place)):
            picture[masks[place]] = place + 1
        self._slices[number] = picture

    def close(self) -> None:
        """Write the output and put it in place; a second time it does nothing."""
        if self._labels.size == 0:
            return
        try:
            self._write()
        finally:
            self._drop()

    def _write(self) -> None:
        written = Written(self.scan, self.names, self._labels, self._slices)
        files = _files(self.path, self.names, self._separate)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as undo:
            staged = [(file.with_name(f".{file.name}.partial{self._suffix}"), file) for file in files]
            for number, (temporary, _) in enumerate(staged):
                undo.callback(remove, temporary)
                remove(temporary)  # of a process that was killed
                _WRITERS[self._suffix](temporary, written.object(number) if self._separate else written)
            if self._suffix != ".dcm":
                record = _record(self.path)
                temporary = record.with_name(f".{record.name}.partial")
                undo.callback(remove, temporary)
                temporary.write_text(written.record(files if self._separate else files * len(self.names)), "utf-8")
                staged.append((temporary, record))
            for temporary, file in staged:
                put_in_place(temporary, file)
        self.files = tuple(file for _, file in staged)

    def _drop(self) -> None:
        self._labels, self._slices = np.zeros(0, np.uint8), np.zeros(0, np.uint8)
        self._open.close()


def _suffix(path: Path) -> str:
    """Return which of the suffixes a path has; the empty one for a folder.

    Raises:
        UserError: Nothing is written under this suffix.
    """
    found = [suffix for suffix in sorted(_WRITERS, key=len) if suffix and path.name.lower().endswith(suffix)]
    if found:
        return found[-1]
    if path.is_dir() or not re.search(r"\.[A-Za-z]\w{0,4}$", path.name):
        return ""
    known = ", ".join(suffix for suffix in _WRITERS if suffix)
    raise UserError(
        f"{path}: no label map is written as '{path.suffix}'; write {known}, or leave the "
        "suffix out for a folder of PNG"
    )


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(_suffix(path))]


def _files(path: Path, names: Sequence[str], separate: bool) -> list[Path]:
    """Return the files that hold label maps: one, or one for each object."""
    if not separate:
        return [path]
    words = [re.sub(r"[^\w.-]+", "_", name) for name in names]
    return [path.with_name(f"{_stem(path)}-{word}{path.name[len(_stem(path)) :]}") for word in words]


def _record(path: Path) -> Path:
    """Return the file beside a label map that holds its names."""
    return path.with_name(f"{_stem(path)}.json")
