"""NRRD (``.nrrd``, ``.nhdr``) and MetaImage (``.mha``, ``.mhd``), through SimpleITK.

The text at the start of the file is looked at first: a header can name other files that hold the values, which must
lie beside it, and SimpleITK reads damaged MetaImages as zeros and prints what it thinks of them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_shards.errors import UserError
from data_shards.readers.axes import pick_channels, turn_to_lps
from data_shards.readers.base import Role, Volume, register

_HEADER_BYTES = 2**20
"""Where a header of text must have ended."""

_DEFLATE_AT_MOST = 1100
"""Deflate packs at most 1032 bytes into one: a file that promises more is damaged or hostile."""

_SPACINGS = ("space directions", "spacings", "elementspacing", "elementsize")
"""The fields of a header that say how far apart the values lie."""

_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""SimpleITK's axes run to the patient's left, back and head; `Volume.affine` is NIfTI's frame: right, front, head."""


@dataclass(frozen=True)
class _Header:
    """What the header says of the values.

    Attributes:
        fields: Its fields, in lower case.
        size: Its length in bytes.
        files: The files that hold the values, where it is not the header's own.
    """

    fields: dict[str, str]
    size: int
    files: tuple[Path, ...]


def _value_files(path: Path) -> tuple[Path, ...]:
    """Return the files that hold the values of a header that lies in a file of its own."""
    nrrd = path.name.lower().endswith((".nrrd", ".nhdr"))
    return (_nrrd_header(path) if nrrd else _meta_header(path)).files


@register(".nrrd", ".nhdr", ".mha", ".mhd", beside=_value_files)
def read_itk(path: Path, role: Role, channels: list[int] | None = None) -> Volume:
    """Read a file and turn it to LPS by the nearest right-angled rotation of its directions; nothing is resampled.

    A 2-D image is a picture: it stays as it is on the screen. Its spacing (z, y, x) has 1 for z, which it lacks.

    Args:
        path: The file.
        role: Of a mask, all channels are taken.
        channels: Which channels of an image, from 0: one, or three to become red, green and blue.

    Raises:
        UserError: The file is damaged, its values lie in another folder or are missing, it is no 2-D or 3-D image, or
            it has neither one nor three channels and none were chosen.
    """
    import SimpleITK as sitk  # noqa: N813  # its users know it by this name

    nrrd = path.name.lower().endswith((".nrrd", ".nhdr"))
    header = _nrrd_header(path) if nrrd else _meta_header(path)
    for file in header.files:
        if not file.is_file():
            raise UserError(f"{path}: its values are in '{file.name}', which is not beside it: put it there")
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if nrrd else "MetaImageIO")
    reader.SetFileName(str(path))
    with _one_line(path):
        reader.ReadImageInformation()
        if reader.GetDimension() not in (2, 3):
            raise UserError(
                f"{path}: has {reader.GetDimension()} dimensions {reader.GetSize()}, as a time series has; "
                "split it into volumes"
            )
        needed = _bytes_needed(reader)
        packed = _check_values(path, header, needed)
        values = _unpacked(path, header, needed) if packed and not nrrd else None
        image = reader.Execute()
    array = sitk.GetArrayFromImage(image)
    if values is not None and values != array.tobytes() and values != array.byteswap().tobytes():
        raise UserError(f"{path}: cannot be read, is it complete? (its header and its compressed values disagree)")
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = pick_channels(path, array, channels if role == "image" else None)
    volume = _placed(path, array, image)
    # Without a spacing SimpleITK takes 1; "nan" and "none" say nothing either.
    known = any(re.search(r"\d", header.fields.get(name, "")) for name in _SPACINGS)
    files = (path, *header.files) if header.files else ()
    return replace(volume, spacing=volume.spacing if known else None, files=files)


def _placed(path: Path, array: np.ndarray, image: Any) -> Volume:
    """Turn a 3-D array (z, y, x) or (z, y, x, 3) to LPS; make a 2-D one the slice of a picture."""
    count = image.GetDimension()
    if count == 2:
        x, y = image.GetSpacing()
        return Volume(array[np.newaxis], (1.0, y, x), flat=True)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return turn_to_lps(path, array.transpose(2, 1, 0, *range(3, array.ndim)), _TO_RAS @ affine)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Keep ITK from printing warnings, and make what it raises one line, without its own source files in it."""
    import SimpleITK as sitk  # noqa: N813

    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.GlobalWarningDisplayOff()
    try:
        yield
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip() and line.strip() != "Reason: Success"]
        # The story is told from the outside in: the last line is the reason.
        reason = re.sub(r"^.*ERROR: *\w+\(0x\w+\): *|^\[\w+\] *", "", lines[-1]) if lines else "no reason given"
        reason = reason.replace(str(path), path.name).strip()
        raise UserError(f"{path}: cannot be read, is it complete? ({reason})") from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def _bytes_needed(reader: Any) -> int:
    """Return how many bytes the values take."""
    import SimpleITK as sitk  # noqa: N813

    bits = re.search(r"\d+", sitk.GetPixelIDValueAsString(reader.GetPixelIDValue()))
    count = int(np.prod([int(side) for side in reader.GetSize()], dtype=object)) * reader.GetNumberOfComponents()
    return count * int(bits[0] if bits else 8) // 8


def _check_values(path: Path, header: _Header, needed: int) -> bool:
    """Check that the values are there before memory is taken for them; return whether they are compressed."""
    stored = path.stat().st_size - header.size
    if header.files:
        stored = sum(file.stat().st_size for file in header.files)
    encoding = header.fields.get("encoding", "raw").lower()
    text = encoding in ("ascii", "text", "txt", "hex") or header.fields.get("binarydata", "").lower() == "false"
    packed = encoding in ("gz", "gzip", "bz2", "bzip2") or header.fields.get("compresseddata", "").lower() == "true"
    # A number written as text takes two bytes or more.
    if needed > stored * (_DEFLATE_AT_MOST if packed else 4 if text else 1):
        raise UserError(
            f"{path}: cannot be read, is it complete? (it holds {stored} bytes of the {needed} it promises)"
        )
    return packed


def _unpacked(path: Path, header: _Header, needed: int) -> bytes:
    """Unpack the values of a MetaImage: of damaged ones SimpleITK makes zeros, or whatever lies in memory."""
    if len(header.files) > 1:
        raise UserError(f"{path}: its values are compressed and in several files: write it as one file")
    with (header.files[0] if header.files else path).open("rb") as file:
        file.seek(0 if header.files else header.size)
        data = file.read()
    size = header.fields.get("compresseddatasize", "" if not header.files else str(len(data)))
    if not re.fullmatch(r"\d{1,18}", size):
        raise UserError(f"{path}: its header does not say how long its values are: it needs a 'CompressedDataSize'")
    stream = zlib.decompressobj(wbits=47)  # zlib or gzip
    try:
        values = stream.decompress(data[: int(size)], needed + 1)
    except zlib.error as error:
        raise UserError(f"{path}: cannot be read, is it complete? (its compressed values are damaged)") from error
    if len(values) != needed or not stream.eof:
        raise UserError(
            f"{path}: cannot be read, is it complete? (its compressed values are not the {needed} promised)"
        )
    return values


def _nrrd_header(path: Path) -> _Header:
    """Read the fields of an NRRD header, which ends at an empty line."""
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    if not start.startswith(b"NRRD"):
        raise UserError(f"{path}: is no NRRD file: its first bytes are not 'NRRD'")
    end = re.search(rb"\r?\n\r?\n", start)
    text = (start[: end.start()] if end else start).decode("utf-8", "replace")
    lines = text.splitlines()
    fields = dict(_field(line, ":") for line in lines[1:] if not line.startswith("#") and ":" in line)
    size = end.end() if end else path.stat().st_size
    places = [number for number, line in enumerate(lines) if _field(line, ":")[0] in ("data file", "datafile")]
    if not places:
        return _Header(fields, size, ())
    if len(places) > 1:
        raise UserError(f"{path}: its header says twice where its values are: repair it")
    where = _field(lines[places[0]], ":")[1]
    names = [where]
    words = where.split()
    if words and words[0].upper() == "LIST":
        names = [line.strip() for line in lines[places[0] + 1 :] if line.strip()]
    elif len(words) in (4, 5) and "%" in words[0]:
        names = _numbered(path, words[0], words[1:4])
    return _Header(fields, size, tuple(_beside(path, name) for name in names))


def _meta_header(path: Path) -> _Header:
    """Read the fields of a MetaImage header, of which ``ElementDataFile`` is the last."""
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    end = re.search(rb"(?:^|[\r\n])\s*ElementDataFile\s*[=:][ \t]*([^\r\n]*)(\r?\n|$)", start)
    # The word must not stand anywhere before, where SimpleITK may see a field in it and this does not.
    if end is None or b"elementdatafile" in start[: end.start()].lower():
        raise UserError(f"{path}: is no MetaImage, or is cut off: its header has no 'ElementDataFile'")
    lines = start[: end.start()].decode("utf-8", "replace").splitlines()
    fields = dict(_field(line, "=:") for line in lines if re.search("[=:]", line))
    where = end[1].decode("utf-8", "replace").strip()
    words = where.split()
    if where.upper() == "LOCAL":
        return _Header(fields, end.end(), ())
    names = [where]
    if words and words[0].upper() == "LIST":
        names = [line.strip() for line in start[end.end() :].decode("utf-8", "replace").splitlines() if line.strip()]
    elif len(words) in (3, 4) and "%" in words[0]:
        names = _numbered(path, words[0], [*words[1:3], words[3] if len(words) == 4 else "1"])
    return _Header(fields, end.end(), tuple(_beside(path, name) for name in names))


def _field(line: str, separators: str) -> tuple[str, str]:
    name, _, value = re.sub(f"[{separators}]", "\0", line, count=1).partition("\0")
    return name.strip().lower(), value.strip("= \t")


def _numbered(path: Path, pattern: str, numbers: list[str]) -> list[str]:
    """Return the names that a pattern such as ``slice%03d.raw 1 20 1`` stands for."""
    if not re.fullmatch(r"[^%]*%0?\d?d[^%]*", pattern) or not all(re.fullmatch(r"-?\d{1,6}", item) for item in numbers):
        raise UserError(
            f"{path}: its values are in '{pattern} {' '.join(numbers)}', which names no files: name one file"
        )
    first, last, step = map(int, numbers)
    return [pattern % number for number in range(first, last + (1 if step > 0 else -1), step or 1)]


def _beside(path: Path, name: str) -> Path:
    """Return a file that a header names, which must lie in the header's folder: it could name any file."""
    parts = PurePosixPath(name).parts
    if not name or name.startswith(("/", "~")) or ".." in parts or "\\" in name or re.match(r"[A-Za-z]:", name):
        raise UserError(
            f"{path}: its header says that its values are in '{name}', outside its folder: put the file beside the "
            "header and name it there"
        )
    return path.parent / name
