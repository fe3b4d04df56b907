"""From what a visitor uploads to one image that can be opened: a file, a series or the frames of a video.

Files are copied into a folder of the visitor's own, under names that are made here; zips are unpacked member by member
into the same place, so that nothing is written elsewhere whatever their names say. Nothing is unpickled.
"""

from __future__ import annotations

import gzip
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from data_shards.errors import UserError, counted
from data_shards.readers import known_suffixes
from data_shards.readers.base import reader_for
from data_shards.readers.dicom import read_dicom
from data_shards.readers.dicom_files import SUFFIXES, has_preamble, headers_of
from data_shards.readers.images import read_images
from trainer.demo.films import frames_of, is_film
from trainer.demo.limits import Limits, check_declared

PICKLES = (".npy", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".bin", ".safetensors", ".onnx")
_HEADERS = (".nhdr", ".mhd")
"""Headers whose values lie in another file, which is uploaded with them."""


@dataclass(frozen=True)
class Upload:
    """What is to be opened.

    Attributes:
        path: The file, or the folder of a series or a video.
        name: What the visitor calls it.
        reader: Options of its reader.
        notes: What the visitor should be told, one line each.
    """

    path: Path
    name: str
    reader: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def take_in(files: Sequence[Path], folder: Path, limits: Limits) -> Upload:
    """Copy what was uploaded, and see what it is.

    Args:
        files: One image, volume or film; several slices of DICOM, or frames; or a zip of these.
        folder: An empty one, of this visitor alone.
        limits: What is allowed.

    Raises:
        UserError: It is too large, damaged, of several kinds or of none that is read.
    """
    if not files:
        raise UserError("no file was uploaded: choose one")
    limits.check_files(len(files), "the upload")
    limits.check_bytes(sum(file.stat().st_size for file in files), "the upload")
    for file in files:
        _check_name(file.name)
    packed = [file for file in files if file.name.lower().endswith(".zip")]
    if packed and len(files) > 1:
        raise UserError(f"{packed[0].name}: upload a zip alone, without other files")
    if packed:
        kept = _unzip(packed[0], folder, limits)
    else:
        names = _distinct([file.name for file in files])
        kept = [Path(shutil.copyfile(file, folder / name)) for file, name in zip(files, names, strict=True)]
    kept = [_unpacked(file, limits) for file in kept]
    films = [file for file in kept if is_film(file.name)]
    if films and len(kept) > 1:
        raise UserError(f"{films[0].name}: upload a film alone, without other files")
    if films:
        kept = frames_of(films[0], limits)
    limits.check_bytes(sum(file.stat().st_size for file in kept), f"{files[0].name}, unpacked")
    check_declared(kept, limits)
    found = _found(kept, folder)
    return Upload(found.path, files[0].name if len(files) == 1 else _called(files), found.reader, found.notes)


def plain(error: BaseException, folder: Path) -> str:
    """A message without the places of this machine: a visitor knows names alone."""
    return str(error).replace(f"{folder}/", "").replace(str(folder), "the upload")


def _called(files: Sequence[Path]) -> str:
    return f"{files[0].name} and {counted(len(files) - 1, 'more file')}"


def _check_name(name: str) -> None:
    """Raise a `UserError` for what is not read, with the reason where there is one."""
    if name.lower().endswith(PICKLES):
        raise UserError(f"{name}: is no image: files that may hold pickles or weights are not opened; save a .nii.gz")


def _distinct(names: Sequence[str]) -> list[str]:
    """Names of files that are not hidden, numbered where several have one."""
    names = [name.lstrip(".") or "file" for name in names]
    count, seen, found = Counter(names), Counter[str](), []
    for name in names:
        found.append(f"{seen[name]:04d}_{name}" if count[name] > 1 else name)
        seen[name] += 1
    return found


def _unzip(path: Path, folder: Path, limits: Limits) -> list[Path]:
    """Unpack a zip, flat.

    Raises:
        UserError: It is damaged, encrypted or too large, or names a place outside of it.
    """
    try:
        with zipfile.ZipFile(path) as packed:
            entries = [entry for entry in packed.infolist() if not entry.is_dir() and not _ignored(entry.filename)]
            limits.check_files(len(entries), path.name)
            limits.check_bytes(sum(entry.file_size for entry in entries), f"{path.name}, unpacked")
            for entry in entries:
                _check_entry(path, entry)
            names = _distinct([_flat(entry.filename) for entry in entries])
            kept, left = [], limits.bytes
            for entry, name in zip(entries, names, strict=True):
                with packed.open(entry) as source:
                    left -= _copy(source, folder / name, left, path, limits)
                kept.append(folder / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(f"{path.name}: is damaged, or no zip that can be read ({type(error).__name__})") from None
    if not kept:
        raise UserError(f"{path.name}: is empty")
    return kept


def _ignored(name: str) -> bool:
    """Whether a member is what an operating system has left beside the files."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return bool(parts) and (parts[0] == "__MACOSX" or parts[-1].startswith(".") or parts[-1] == "Thumbs.db")


def _check_entry(path: Path, entry: zipfile.ZipInfo) -> None:
    place = PurePosixPath(entry.filename.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts or ":" in place.parts[0]:
        raise UserError(f"{path.name}: '{entry.filename}' names a place outside of the zip: it is not opened")
    if entry.flag_bits & 1:
        raise UserError(f"{path.name}: is encrypted: upload it without a password")
    if (entry.external_attr >> 16) & 0o170000 == 0o120000:
        raise UserError(f"{path.name}: '{entry.filename}' is a link: pack the file itself")
    _check_name(place.name)
    if place.name.lower().endswith(".zip"):
        raise UserError(f"{path.name}: holds another zip, '{place.name}': upload that")


def _flat(name: str) -> str:
    """A member's path as one name, so that frames keep the order of their folders."""
    return "_".join(PurePosixPath(name.replace("\\", "/")).parts)[-200:]


def _copy(source: IO[bytes], target: Path, most: int, path: Path, limits: Limits) -> int:
    """Copy at most so many bytes, whatever a header says, and return how many there were."""
    done = 0
    with target.open("xb") as file:
        while block := source.read(2**20):
            done += len(block)
            if done > most:
                limits.check_bytes(limits.bytes + 1, f"{path.name}, unpacked")
            file.write(block)
    return done


def _unpacked(path: Path, limits: Limits) -> Path:
    """Unpack a gzipped file, bounded, in its place; others stay."""
    if not path.name.lower().endswith(".gz"):
        return path
    target = path.with_name(path.name[:-3])
    if target.exists():
        raise UserError(f"{target.name}: is there packed and unpacked: upload one of them")
    try:
        with gzip.open(path) as source:
            _copy(source, target, limits.bytes, path, limits)  # type: ignore[arg-type]  # it reads bytes
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path.name}: is damaged, or no gzip ({type(error).__name__}): upload it again") from None
    path.unlink()
    return target


def _found(files: Sequence[Path], folder: Path) -> Upload:
    """What the files are together."""
    if len(files) == 1:
        return _single(files[0])
    headers = [file for file in files if file.name.lower().endswith(_HEADERS)]
    if len(headers) == 1:
        return _single(headers[0])
    readers = [(file, _reader(file)) for file in files]
    pictures = [file for file, reader in readers if reader is read_images]
    dicom = [file for file, reader in readers if reader is read_dicom]
    volumes = [file for file, reader in readers if reader not in (None, read_images, read_dicom)]
    kinds = [kind for kind in (pictures, dicom, volumes) if kind]
    if not kinds:
        raise UserError(f"none of the {len(files)} files is read as an image; known are DICOM, {_known()}")
    if len(kinds) > 1 or len(volumes) > 1:
        names = ", ".join(kind[0].name for kind in (kinds if len(kinds) > 1 else [[one] for one in volumes[:2]]))
        raise UserError(f"several images at once ({names}): upload one volume, one series or the frames of one video")
    left = [file for file, reader in readers if reader is None]
    for file in left:
        file.unlink()
    what = "1 file that is no image" if len(left) == 1 else f"{counted(len(left), 'file')} that are no images"
    notes = (f"{what}: left out",) if left else ()
    if volumes:
        return Upload(volumes[0], "", {}, notes)
    if pictures:
        return Upload(folder, "", _PICTURES, notes)
    return _series(folder, notes)


def _single(path: Path) -> Upload:
    reader = _reader(path)
    if reader is None:
        raise UserError(f"{path.name}: is no image that is read here; known are DICOM, {_known()}")
    if reader is read_dicom and path.suffix.lower() not in SUFFIXES:  # some names end as those of another format
        path = path.rename(path.with_name(f"{path.name}.dcm"))
    return Upload(path, "", _PICTURES if reader is read_images else {})


_PICTURES = {"orientation": "apply", "alpha": "drop"}
"""As a visitor saw the picture, on a phone too."""


def _reader(path: Path) -> Any:
    """What reads a file; a name without a known ending is DICOM where it starts as DICOM does."""
    if path.suffix.lower() not in SUFFIXES and has_preamble(path):
        return read_dicom
    try:
        reader = reader_for(path)
    except UserError:
        return None
    return None if reader is read_dicom and path.suffix.lower() not in SUFFIXES else reader


def _series(folder: Path, notes: tuple[str, ...]) -> Upload:
    """The series with most images of a folder of DICOM."""
    groups = Counter(header.series for header in headers_of(folder) if header.kind == "image")
    if not groups:
        raise UserError("the DICOM files hold no image: upload the series itself")
    series, count = groups.most_common(1)[0]
    if len(groups) == 1:
        return Upload(folder, "", {}, notes)
    line = f"{len(groups)} series: the largest, of {counted(count, 'file')}, was opened; upload another one by itself"
    return Upload(folder, "", {"series_uid": series}, (*notes, line))


def _known() -> str:
    return ", ".join(suffix for suffix in known_suffixes() if suffix != ".json")
