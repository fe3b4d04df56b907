"""How label maps are written: NIfTI, NRRD, MetaImage, npz and PNG.

Shapes: D slices, N objects, H W height and width, I J K as the source orders its axes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import UserError
from data_shards.readers.nifti import quiet
from trainer.volumes.scan import Scan
from trainer.volumes.scan_grid import Grid

_PLACE = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)
"""What of a NIfTI header says where its voxels lie; the rest may name a patient, and is not taken over."""


@dataclass(frozen=True)
class Written:
    """What is written.

    Attributes:
        scan: What it lies on.
        names: Names of the N objects.
        labels: (I, J, K), 0 or the number of an object, from 1; or (I, J, K, N) of 0 and 1.
        slices: The same as (D, H, W) or (D, H, W, N).
    """

    scan: Scan
    names: tuple[str, ...]
    labels: np.ndarray
    slices: np.ndarray

    def object(self, number: int) -> Written:
        """Return one of the objects, as a label map of its own."""
        return replace(
            self,
            names=self.names[number : number + 1],
            labels=self.labels[..., number],
            slices=self.slices[..., number],
        )

    def record(self, files: Sequence[Path]) -> str:
        """Return what the label map holds, as JSON; `files` are those that the objects lie in."""
        counts = np.zeros(len(self.names) + 1, np.int64)
        apart = self.labels.ndim == 4
        for plane in range(self.labels.shape[2]):
            values = self.labels[:, :, plane]
            counts[1:] += (
                values.sum(axis=(0, 1), dtype=np.int64)
                if apart
                else np.bincount(values.ravel(), minlength=len(counts))[1:]
            )
        labels = [
            {"name": name, "value": 1 if apart else number, "voxels": int(counts[number]), "file": file.name}
            for number, (name, file) in enumerate(zip(self.names, files, strict=True), start=1)
        ]
        return json.dumps({"labels": labels}, indent=2) + "\n"


def check_geometry(path: Path, grid: Grid, suffix: str) -> None:
    """Raise a `UserError` if a format cannot say where the voxels of a grid lie."""
    if grid.affine is None:
        raise UserError(
            f"{path}: {grid.path} does not say where it lies in a patient, as this format has to: write .npz, or leave "
            "the suffix out for a folder of PNG"
        )
    if not grid.even:
        raise UserError(
            f"{path}: the slices of {grid.path} are not at even distances, which this format cannot say: write .dcm"
        )
    axes = grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)
    if suffix in (".nrrd", ".mha") and np.abs(axes.T @ axes - np.eye(3)).max() > 1e-3:
        raise UserError(
            f"{path}: the axes of {grid.path} are not at right angles, as they are in this format: write .nii.gz"
        )


def write_nifti(path: Path, written: Written) -> None:
    """Write a NIfTI file; of a NIfTI source with its forms, codes and units as they are."""
    import nibabel

    grid, labels = written.scan.grid, written.labels
    source = nifti_header(grid.path)
    second = isinstance(source, nibabel.Nifti2Header) or max(labels.shape) >= 2**15
    header = (nibabel.Nifti2Header if second else nibabel.Nifti1Header)()
    header.set_data_dtype(labels.dtype)
    header.set_data_shape(labels.shape)
    if source is None:
        header.set_sform(grid.affine, "scanner")
        header.set_qform(grid.affine, "scanner", strip_shears=True)
        header.set_xyzt_units("mm")
    else:
        for name in _PLACE:
            header[name] = source[name]
        header["pixdim"][:4] = source["pixdim"][:4]
    header["descrip"] = b"labels, sam-trainer"
    with quiet():
        image: Any = (nibabel.Nifti2Image if second else nibabel.Nifti1Image)(labels, header.get_best_affine(), header)
        image.to_filename(path)


def nifti_header(path: Path) -> Any:
    """Return the header of a NIfTI file, None for files of other formats."""
    import nibabel

    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return None
    with quiet():
        return nibabel.load(path).header


def write_itk(path: Path, written: Written) -> None:
    """Write NRRD or MetaImage, compressed."""
    import SimpleITK as sitk  # noqa: N813  # its users know it by this name

    affine = written.scan.grid.affine
    assert affine is not None  # `check_geometry` saw to it
    places = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK's axes run to the patient's left, back and head
    spacing = np.linalg.norm(places[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.asarray(written.labels).T)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((places[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(places[:3, 3].tolist())
    sitk.WriteImage(image, str(path), True)


def write_npz(path: Path, written: Written) -> None:
    """Write an npz archive as MedSAM's tools do: ``gts`` (Z, Y, X) in LPS order, ``spacing`` (x, y, z), ``names``."""
    scan = written.scan
    arrays: dict[str, Any] = {"gts": scan.grid.volume(written.labels), "names": np.array(written.names, dtype=np.str_)}
    spacing = scan.volume_spacing
    if spacing is not None:
        arrays["spacing"] = np.array(spacing[::-1])
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def write_pictures(path: Path, written: Written) -> None:
    """Write a folder with a PNG for each slice, named as the frames of the source, or by their numbers."""
    from PIL import Image

    path.mkdir()
    files = written.scan.place.files
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        names = [file.name for file in files]
    for number, picture in enumerate(written.slices):
        name = names[number] if names else f"{number:05d}"
        Image.fromarray(np.ascontiguousarray(picture)).save(path / f"{name}.png")


def write_picture(path: Path, written: Written) -> None:
    """Write the one slice of a picture as a PNG."""
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(written.slices[0])).save(path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Replace a file, or the files of a folder that have the same names."""
    if temporary.is_dir() and path.exists():
        for file in temporary.iterdir():
            file.replace(path / file.name)
    else:
        temporary.replace(path)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
