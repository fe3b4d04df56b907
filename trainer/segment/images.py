"""The volumes and images of a folder, each with the name that its masks will have."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_shards.errors import UserError
from data_shards.readers import known_suffixes
from data_shards.readers.base import Reader, files_of, known_readers
from data_shards.readers.dicom import read_dicom
from data_shards.readers.dicom_files import SUFFIXES, has_preamble, headers_of
from data_shards.readers.images import read_images
from trainer.volumes.scan import made_in

FORMATS = {"nii.gz": ".nii.gz", "nrrd": ".nrrd", "mha": ".mha", "npz": ".npz", "dcm": ".dcm", "png": ".png"}
"""What ``--as`` takes, with the suffix of its files."""
_OWN = {".nii": ".nii.gz", ".nii.gz": ".nii.gz", ".nhdr": ".nrrd", ".nrrd": ".nrrd", ".mhd": ".mha", ".mha": ".mha"}
"""In what masks are written by default, by the image's suffix; those of pictures as PNG, others as npz."""


@dataclass(frozen=True)
class Item:
    """One volume or image.

    Attributes:
        path: The file, or the folder of a series.
        key: Its path in the folder, with slashes.
        name: The same without suffix.
        suffix: Of masks in its own format.
        reader: What its reader needs to be told, besides what the user says: which series of a folder.
    """

    path: Path
    key: str
    name: str
    suffix: str
    reader: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, int]:
        """What tells whether it was exchanged, without reading it: how many files it has, and their bytes."""
        return sizes_of(self.path)


def images_in(folder: Path, glob: str | None = None, leave: Sequence[Path] = ()) -> tuple[list[Item], int]:
    """Find what can be segmented in a folder and those below it: files of known formats, and series of DICOM.

    Hidden files, and pictures that `trainer predict` has made, are passed over. Every picture is an image by itself.

    Args:
        folder: Where to look.
        glob: What paths in the folder have to match, from their right end, as in ``*_image.nii.gz``.
        leave: Folders that are not looked into.

    Returns:
        The images by path, and how many other files there are.

    Raises:
        UserError: The folder is not there, or nothing in it can be read.
    """
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: is no folder: name the one that holds the images")
    left = {path.resolve() for path in leave}
    found: list[Item] = []
    others = 0
    for place, below, names in os.walk(folder, followlinks=True):
        here = Path(place)
        above = {here.resolve(), *here.resolve().parents}  # where a link would lead in a circle
        below[:] = sorted(
            name for name in below if not name.startswith(".") and (here / name).resolve() not in left | above
        )
        own = made_in(here)
        files = [here / name for name in sorted(names) if not name.startswith(".") and here / name not in own]
        items, rest = _images_of(folder, here, files)
        found += items
        others += rest
    found = [item for item in found if glob is None or PurePosixPath(item.key).match(glob)]
    if not found:
        wanted = f"matches --glob {glob}" if glob else "can be read as an image"
        raise UserError(f"--folder {folder}: nothing in it {wanted}; known are DICOM, {', '.join(known_suffixes())}")
    return sorted(found, key=lambda item: item.key), others


def check_names(items: Sequence[Item]) -> None:
    """Raise a `UserError` if the masks, or the records, of two images would have one name."""
    taken: dict[str, Item] = {}
    for item in items:
        for name in (item.name, f"{item.name}.predict"):  # `a.predict.json` tells how the masks of `a` were made
            if name in taken:
                raise UserError(
                    f"{taken[name].key} and {item.key}: the masks of both would be called {item.name}: choose by "
                    "--glob, or rename one"
                )
            taken[name] = item


def stem_of(name: str, suffixes: Collection[str]) -> str:
    """A file's name without the longest of some suffixes that it ends in."""
    fitting = [suffix for suffix in suffixes if suffix.strip("/") and name.lower().endswith(suffix)]
    return name[: len(name) - len(max(fitting, key=len))] if fitting else name


def sizes_of(path: Path) -> dict[str, int]:
    """Number and bytes of the files that hold an image or a label map."""
    try:
        files = files_of(path)
    except UserError:  # which is told when it is opened
        files = [path]
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files if file.is_file())}


def _images_of(folder: Path, here: Path, files: Sequence[Path]) -> tuple[list[Item], int]:
    """Images that lie in one folder, and how many of its files are none."""
    readers = known_readers()[0]
    items, dicom, others = [], [], 0
    for path in files:
        reader = _reader(path, readers)
        if reader is read_dicom:
            dicom.append(path)
        elif reader is None:
            others += 1
        else:
            suffix = path.name[len(stem_of(path.name, readers)) :].lower()
            own = ".png" if reader is read_images else _OWN.get(suffix, ".npz")
            items.append(_item(folder, path, stem_of(path.name, readers), own))
    series = _series(folder, here) if dicom else []
    return [*items, *series], others + (0 if series else len(dicom))


def _reader(path: Path, readers: dict[str, Reader]) -> Reader | None:
    """What reads a file: of those without a known suffix only what starts as DICOM does is read."""
    suffix = path.name[len(stem_of(path.name, readers)) :].lower()
    if suffix and suffix not in SUFFIXES:
        return readers[suffix]
    try:
        return read_dicom if suffix or has_preamble(path) else None
    except OSError:
        return None


def _series(folder: Path, here: Path) -> list[Item]:
    """The series of one folder: it is one itself, or each of several has a name of its own; none without images."""
    alone = [_item(folder, here, here.resolve().name if here == folder else here.name, ".dcm")]
    try:
        headers = [header for header in headers_of(here) if header.kind == "image"]
    except UserError:  # which is told when it is opened
        return alone
    groups: dict[str, list[Path]] = {}
    numbers = {header.series: header.number for header in headers}
    for header in headers:
        groups.setdefault(header.series, []).append(header.path)
    if len(groups) < 2:
        return alone if groups else []
    items = []
    for series, some in groups.items():
        if len(some) == 1:
            items.append(_item(folder, some[0], stem_of(some[0].name, SUFFIXES), ".dcm"))
        else:
            one = _item(folder, here / f"series-{numbers[series]}", f"series-{numbers[series]}", ".dcm")
            items.append(Item(here, one.key, one.name, ".dcm", {"series_uid": series}))
    return items


def _item(folder: Path, path: Path, stem: str, suffix: str) -> Item:
    if path == folder:  # it is a series itself
        return Item(path, stem, stem, suffix)
    key = path.relative_to(folder)
    return Item(path, key.as_posix(), key.with_name(stem).as_posix(), suffix)
