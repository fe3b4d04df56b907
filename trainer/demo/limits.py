"""How much a visitor may bring: bytes, files and voxels, checked before anything is unpacked or decoded."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError, counted
from data_shards.readers.base import files_of, reader_for
from data_shards.readers.dicom import read_dicom
from data_shards.readers.dicom_files import open_dicom, reading
from data_shards.readers.images import read_images
from data_shards.readers.nifti import quiet, read_nifti
from data_shards.readers.sitk import read_itk

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


@dataclass(frozen=True)
class Limits:
    """Bounds of one upload.

    Attributes:
        bytes: Of all its files, packed as well as unpacked.
        voxels: Or pixels, of all slices or frames.
        files: In it, and in its zip.
    """

    bytes: int = 512 * 2**20
    voxels: int = 400_000_000
    files: int = 5000

    def check_bytes(self, count: int, what: str) -> None:
        """Raise a `UserError` if something has more bytes than may be."""
        if count > self.bytes:
            raise UserError(f"{what}: more than the {size(self.bytes)} that --max-upload allows: cut it")

    def check_files(self, count: int, what: str) -> None:
        """Raise a `UserError` if there are more files than may be."""
        if count > self.files:
            raise UserError(f"{what}: {counted(count, 'file')}, at most {self.files:,} are taken: cut it")

    def check_voxels(self, count: int, what: str) -> None:
        """Raise a `UserError` if there are more voxels than may be."""
        if count > self.voxels:
            raise UserError(
                f"{what}: {count:,} voxels are more than the {self.voxels:,} that --max-voxels allows: cut it or make "
                "it smaller"
            )


def parse_size(text: str) -> int:
    """Bytes of a text such as ``512MB``, a kB being 1,024.

    Raises:
        UserError: It is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)i?b?", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--max-upload {text}: give a size, as in 512MB or 2GB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_voxels(text: str) -> int:
    """Voxels of a text such as ``400000000`` or ``400M``, a million.

    Raises:
        UserError: It is no number.
    """
    match = re.fullmatch(r"(\d+)\s*(m?)", text.strip().lower())
    if match is None or not int(match[1]):
        raise UserError(f"--max-voxels {text}: give a number, as in 400M")
    return int(match[1]) * (10**6 if match[2] else 1)


def size(count: int) -> str:
    """Bytes in words, as ``1.5 GB``."""
    for unit, scale in (("GB", 2**30), ("MB", 2**20), ("kB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return counted(count, "byte")


def check_declared(files: Sequence[Path], limits: Limits) -> None:
    """See in their headers how large images are, before any of them is decoded.

    What a header does not say is left to its reader, which tells of damage.

    Raises:
        UserError: They are larger than allowed.
    """
    total = 0
    for file in files:
        total += _declared(file, limits)
        limits.check_voxels(total, file.name if len(files) == 1 else counted(len(files), "file"))


def _declared(path: Path, limits: Limits) -> int:
    """Voxels that a file promises; 0 where it says nothing that could be read."""
    try:
        reader = reader_for(path)
    except UserError:
        return 0
    if path.name.lower().endswith(".npz"):
        return _npz(path, limits)
    how = next((declare for known, declare in _DECLARE if known is reader), None)
    try:
        return 0 if how is None else how(path)
    except UserError:
        raise
    except Exception:  # damaged in any of the libraries' ways: the reader will say how, in one line
        return 0


def _npz(path: Path, limits: Limits) -> int:
    """See what an npz unpacks to; its voxels are counted once it is open, at a byte each or more."""
    try:
        with zipfile.ZipFile(path) as packed:
            unpacked = sum(entry.file_size for entry in packed.infolist())
    except (zipfile.BadZipFile, OSError):
        return 0
    limits.check_bytes(unpacked, f"{path.name}, unpacked")
    return 0


def _nifti(path: Path) -> int:
    import nibabel

    with quiet():
        return _product(nibabel.load(path).header.get_data_shape())


def _itk(path: Path) -> int:
    import SimpleITK as sitk  # noqa: N813  # its users know it by this name

    files_of(path)  # a header may not name files elsewhere: told before ITK sees it
    header = sitk.ImageFileReader()
    header.SetFileName(str(path))
    header.ReadImageInformation()
    return _product([*header.GetSize(), header.GetNumberOfComponents()])


def _picture(path: Path) -> int:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return _product([*picture.size, int(getattr(picture, "n_frames", 1))])
    except Image.DecompressionBombError:  # Pillow's own limit, for one picture
        raise UserError(
            f"{path.name}: over {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:,.0f} million pixels in one picture: make it "
            "smaller"
        ) from None


def _dicom(path: Path) -> int:
    with reading(path):
        header = open_dicom(path, ("Rows", "Columns", "NumberOfFrames"))
        return _product([int(header.get(name) or one) for name, one in _SIZES])


_SIZES = (("Rows", 0), ("Columns", 0), ("NumberOfFrames", 1))
"""Elements of a header, and what they are where it lacks them."""


_DECLARE = ((read_nifti, _nifti), (read_itk, _itk), (read_images, _picture), (read_dicom, _dicom))


def _product(numbers: Sequence[int]) -> int:
    product = 1
    for number in numbers:
        product *= int(number)
    return product
