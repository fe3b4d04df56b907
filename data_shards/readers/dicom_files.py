"""DICOM files: opening them safely, finding the series in a folder, and who the patient is.

Of a header only the numbers that place and scale the pixels are used. What a message says of a file is its path and
what is wrong, never a value of its header, which may name a patient.
"""

from __future__ import annotations

import logging
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_shards.errors import UserError
from data_shards.readers.base import fits_name

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIXES = (".dcm", ".dicom", ".ima")
"""Endings of names that promise DICOM. Many files have no such ending and are known by their preamble."""

Kind = Literal["image", "seg", "rtstruct", "slide", "other"]

_SEG = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # Segmentation, Label Map Segmentation
_RTSTRUCT = ("1.2.840.10008.5.1.4.1.1.481.3",)
_SLIDE = ("1.2.840.10008.5.1.4.1.1.77.1.6",)  # VL Whole Slide Microscopy Image
_DEFLATED = "1.2.840.10008.1.2.1.99"
_NO_IMAGE = ("RTDOSE", "RTPLAN", "RTIMAGE", "PR", "SR", "KO", "REG", "FID", "SMR")
"""Modalities of what lies beside images in an export."""

_MOST_BYTES = 2**28
_MOST_RATIO = 200
"""What a compressed file may unpack to: this many bytes, or so many times its size. Blank slices shrink a lot."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Silence the library, and turn whatever it raises on a damaged file into one line without values of the header.

    Raises:
        UserError: Anything was raised.
    """
    logger = logging.getLogger("pydicom")
    before, logger.propagate = logger.propagate, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # All that the library says of a truncated file is a warning.
            warnings.filterwarnings("error", message="Unexpected end of file")
            yield
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{path}: cannot be read: its sequences are nested too deeply") from None
    except Exception as error:  # the library raises many things, whose texts quote the header
        reason = "it ends too early" if "end of file" in str(error) else type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise UserError(f"{path}: cannot be read as DICOM, is it complete? ({reason})") from None
    finally:
        logger.propagate = before


def open_dicom(path: Path, tags: Sequence[str] | None = None) -> Dataset:
    """Read a file; use it inside `reading`.

    Args:
        path: The file.
        tags: Keywords of the only elements wanted, which leaves the pixels unread; None reads all.

    Raises:
        UserError: It is no DICOM file, or unpacks to far more than it holds.
    """
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if not path.is_file():
        raise UserError(f"{path}: is not a file: name a DICOM file, or the folder of a series")
    preamble = has_preamble(path)
    if preamble:
        _check_deflated(path)
    dataset = pydicom.dcmread(
        path, stop_before_pixels=tags is not None, specific_tags=list(tags) if tags else None, force=not preamble
    )
    _check_end(dataset, path)
    wanted = ("SOPClassUID", "Modality", "Rows")
    if not preamble and not any(name in dataset for name in (tags or wanted) if name in wanted):
        raise UserError(f"{path}: is no DICOM file, or a damaged one: leave it out or copy it again")
    if "TransferSyntaxUID" not in dataset.file_meta:  # files of old have no such header; the library saw how it is
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return dataset


def _check_end(dataset: Dataset, path: Path) -> None:
    """Raise if the last element is shorter than it says, which the library leaves at that."""
    from pydicom.dataelem import RawDataElement

    tags = list(dataset.keys())
    last = dataset.get_item(tags[-1]) if tags else None
    if isinstance(last, RawDataElement) and last.length != 0xFFFFFFFF and len(last.value or b"") < last.length:
        raise UserError(f"{path}: cannot be read as DICOM, is it complete? (it ends too early)")


def has_preamble(path: Path) -> bool:
    """Whether a file starts as DICOM does."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def most_bytes(path: Path) -> int:
    """Return how many bytes the content of a file may unpack to: more is taken for damage or malice."""
    return max(_MOST_BYTES, _MOST_RATIO * path.stat().st_size)


def _check_deflated(path: Path) -> None:
    """Raise if a file that is compressed as a whole unpacks to too much."""
    from pydicom.filereader import _read_file_meta_info, read_preamble

    with path.open("rb") as file:
        read_preamble(file, force=False)
        if _read_file_meta_info(file).get("TransferSyntaxUID") != _DEFLATED:
            return
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        unpacker.decompress(file.read(), most_bytes(path))
    if unpacker.unconsumed_tail:
        raise UserError(f"{path}: unpacks to more than {most_bytes(path):,} bytes: leave it out")


def kind_of(dataset: Dataset) -> Kind:
    """Return what a file holds."""
    sop_class, modality = str(dataset.get("SOPClassUID", "")), dataset.get("Modality")
    if sop_class in _SEG or modality == "SEG":
        return "seg"
    if sop_class in _RTSTRUCT or modality == "RTSTRUCT":
        return "rtstruct"
    if sop_class in _SLIDE:
        return "slide"
    return "image" if "Rows" in dataset and modality not in _NO_IMAGE else "other"


@dataclass(frozen=True)
class Header:
    """What tells one file of a folder from another. It never leaves the reader.

    Attributes:
        path: The file.
        kind: What it holds.
        series: Identifier of its series.
        number: Number of its series, or None.
        modality: ``"CT"``, ``"MR"``, …
        patient: Identifier of the patient; empty if it has none.
        frames: Number of its slices.
    """

    path: Path
    kind: Kind
    series: str
    number: int | None
    modality: str
    patient: str
    frames: int


_HEADER = ("SOPClassUID", "Modality", "SeriesInstanceUID", "SeriesNumber", "PatientID", "Rows", "NumberOfFrames")


def headers_of(path: Path) -> list[Header]:
    """Return the headers of a file, or of all DICOM files in a folder, by name; subfolders are left alone.

    Raises:
        UserError: A file is damaged, or there is none.
    """
    if not path.is_dir():
        return [_header(path)]
    found = sorted(item for item in path.iterdir() if item.is_file() and not item.name.startswith("."))
    named = [item for item in found if item.suffix.lower() in SUFFIXES or has_preamble(item)]
    if not named:
        raise UserError(f"{path}: no DICOM file in this folder: name the folder that holds the slices themselves")
    return [_header(item) for item in named]


def _header(path: Path) -> Header:
    with reading(path):
        dataset = open_dicom(path, _HEADER)
        number = dataset.get("SeriesNumber")
        return Header(
            path=path,
            kind=kind_of(dataset),
            series=str(dataset.get("SeriesInstanceUID", "")),
            number=None if number is None else int(number),
            modality=str(dataset.get("Modality") or ""),
            patient=clean_text(dataset.get("PatientID")),
            frames=int(dataset.get("NumberOfFrames") or 1),
        )


def series_in(path: Path, number: int | None = None, uid: str | None = None) -> list[Path]:
    """Return the files of the one series of images that a path holds.

    Args:
        path: A file, or a folder whose segmentations, contours and the like are passed over.
        number: SeriesNumber of the series wanted.
        uid: SeriesInstanceUID of the series wanted.

    Raises:
        UserError: There is no such series or more than one, or its files are of several patients.
    """
    headers = headers_of(path)
    if len(headers) == 1 and headers[0].kind != "image":
        raise UserError(f"{path}: {_NOT_READ[headers[0].kind]}")
    groups: dict[str, list[Header]] = {}
    for header in headers:
        if header.kind == "image":
            groups.setdefault(header.series, []).append(header)
    if not groups:
        raise UserError(f"{path}: holds no image, only what was drawn on images or derived from them")
    fitting = [
        group
        for name, group in groups.items()
        if (number is None or group[0].number == number) and (uid is None or name == uid)
    ]
    if len(fitting) != 1:
        fault = "holds several series" if number is None and uid is None else f"{len(fitting) or 'no'} series fit"
        key = "series" if number is None else "series_uid" if fitting else "another series"
        raise UserError(f"{path}: {fault}: {_choices(groups.values())}: choose by {key}, as in reader: {{series: 2}}")
    if len({header.patient for header in fitting[0]}) > 1:
        raise UserError(f"{path}: the files of its series are of several patients: separate them")
    return [header.path for header in fitting[0]]


_NOT_READ: dict[Kind, str] = {
    "seg": "is a segmentation, not an image: name the series that it lies on",
    "rtstruct": "is a set of contours, not an image: name the series that it lies on",
    "slide": "is a whole slide in DICOM, whose tiles are not read: convert it to TIFF",
    "other": "holds no image that can be read: name a file or folder with images",
}


def _choices(groups: Any) -> str:
    """Describe series without their names: '30 slices (series 2, CT) or …'."""
    words = [
        f"{sum(item.frames for item in group)} slices (series {_or_none(group[0].number)}, {group[0].modality or '?'})"
        for group in groups
    ]
    return " or ".join(sorted(words))


def _or_none(number: int | None) -> str:
    return "without a number" if number is None else str(number)


def patient_of(path: str | Path) -> str | None:
    """Return the patient's identifier from the header of a file, or of every DICOM file in a folder.

    Returns:
        The identifier, or None where the files have none. It names a patient: hash it.

    Raises:
        UserError: The path is no DICOM, or its files are of several patients.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file: correct the path or --root")
    if path.is_file() and path.suffix.lower() not in SUFFIXES and not has_preamble(path):
        raise UserError(f"{path}: is no DICOM file, so its header names no patient: give 'patient' another rule")
    patients = {header.patient for header in headers_of(path) if header.kind != "other"}
    if len(patients) > 1:
        raise UserError(f"{path}: its files are of several patients: separate them, or give 'patient' another rule")
    return next(iter(patients), "") or None


def clean_text(value: Any) -> str:
    """Return text of a header in one line, without the padding and control characters that writers leave."""
    text = "".join(character if character.isprintable() else " " for character in str(value or ""))
    return " ".join(text.split())


def is_wanted(name: str, regions: Sequence[str] | None) -> bool:
    """Whether a segment or region is one of those wanted, ``*`` being any text; all are if none are named."""
    return regions is None or any(fits_name(name, text) for text in regions)


def numbers(dataset: Dataset | None, keyword: str, count: int, path: Path) -> np.ndarray | None:
    """Return the numbers (N,) of an element, or None where it is missing or empty.

    Raises:
        UserError: There are more or fewer of them, or they are no numbers.
    """
    value = None if dataset is None else dataset.get(keyword)
    if value is None or value == "":
        return None
    found = np.atleast_1d(np.asarray(value, dtype=float))
    if found.size == 0:
        return None
    if found.size != count or not all(math.isfinite(number) for number in found):
        raise UserError(f"{path}: its {keyword} is not {count} numbers: repair the header or leave the file out")
    return found


def number_in(dataset: Dataset | None, keyword: str, path: Path) -> float | None:
    """Return the one number of an element, or None where it is missing or empty; see `numbers`."""
    found = numbers(dataset, keyword, 1, path)
    return None if found is None else float(found[0])
