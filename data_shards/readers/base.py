"""What a reader is, and which one reads which file.

A reader of pictures turns a file into a `Volume`: the image, or a label map. A reader of drawings turns a file into
`Layer`s over an image that is known already, as formats without a grid of their own need (contours, annotations).
Shapes: Z, Y, X are slices, rows and columns in LPS order.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_shards.errors import UserError, nearest
from data_shards.schema import plain_value

Role = Literal["image", "mask"]
"""What the caller wants of a file: formats that hold both in one file need to know."""

FOLDER = "/"
"""The suffix under which the reader of folders is registered."""


@dataclass(frozen=True)
class Volume:
    """A stack of slices in LPS order.

    Rows run anterior to posterior, columns from the patient's right to left, slices from inferior to superior, as in
    SimpleITK's array of an axial scan. A picture without a place in a patient is one slice, as it is seen on a screen.

    Attributes:
        array: (Z, Y, X) grey or labels, or (Z, Y, X, 3) RGB, at native dtype. That of a large slide is a `Windowed`.
        spacing: Distance between neighbours (z, y, x) in mm, or None if the file does not say.
        affine: (4, 4) from an index (x, y, z) of the array to mm in the scanner's frame, or None if the file does not
            say.
        flat: Whether the slices are pictures, which have no anatomical axes.
        frame: Identifier of the scanner's frame of reference, for formats that have one. It never leaves the reader.
        files: The files that were read, if they are others than the path.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None
    affine: np.ndarray | None = None
    flat: bool = False
    frame: str | None = None
    files: tuple[Path, ...] = ()

    def apart(self, other: Volume) -> float:
        """Largest distance in mm between a corner voxel of two volumes of one shape; 0 if either has no place."""
        if self.affine is None or other.affine is None:
            return 0.0
        last = np.array(self.array.shape[2::-1]) - 1
        corners = np.array([[*(last * corner), 1.0] for corner in np.ndindex(2, 2, 2)])
        gaps = corners @ (self.affine - other.affine).T
        return float(np.sqrt((gaps[:, :3] ** 2).sum(axis=1)).max())


class Windowed:
    """Stands in for the array of a `Volume` that does not fit into the memory: windows of its slices are read.

    Attributes:
        shape: (Z, Y, X) or (Z, Y, X, 3).
        dtype: Of its values.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.ndim, self.size = len(shape), int(np.prod(shape, dtype=object))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: tuple[int, slice, slice]) -> np.ndarray:
        """Read a window (y, x) or (y, x, 3): number of the slice, rows and columns, both with a start and a stop."""
        raise NotImplementedError


@dataclass(frozen=True)
class Layer:
    """One drawing over a volume, kept as the box that holds it.

    Attributes:
        values: The content of the box, 0 around it: (z, y, x) labels, probabilities or 0/1, or (z, y, x, 3) colours.
        origin: First voxel (z, y, x) of the box in the volume.
        name: What the file calls it: segment, region, category, or stem of the file's name.
        number: The file's number of it: segment, region, category or channel.
    """

    values: np.ndarray
    origin: tuple[int, int, int] = (0, 0, 0)
    name: str = ""
    number: int | None = None


@dataclass(frozen=True)
class Drawing:
    """What a file says was drawn over a volume.

    Attributes:
        layers: The drawings, in the order of the file; they may overlap.
        complete: Whether everything was looked for in the whole volume. Where it is False, only a name that occurs
            among the layers counts as looked for: a region set lists what somebody drew, not what they searched.
        volume: The label map that it was read from, to compare its grid with the image's; None if it has no grid.
        names: Every name and number that the file knows, drawn here or not; None where it has no such list.
        unread: Name and number of each drawing here that is left out on request: no negative, though nothing is read.
    """

    layers: tuple[Layer, ...]
    complete: bool = True
    volume: Volume | None = None
    names: tuple[tuple[str, int], ...] | None = None
    unread: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Ground:
    """The image that a drawing lies on.

    Attributes:
        path: Its file or folder.
        volume: What was read from it.
    """

    path: Path
    volume: Volume


Reader = Callable[..., Volume]
"""Called as ``reader(path, role, **options)``; its keyword arguments are the options of its format."""

DrawingReader = Callable[..., Drawing]
"""Called as ``reader(path, ground, **options)``."""


@dataclass
class _Registry:
    pictures: dict[str, Reader] = field(default_factory=dict)
    drawings: dict[str, DrawingReader] = field(default_factory=dict)
    beside: dict[str, Callable[[Path], Sequence[Path]]] = field(default_factory=dict)


_KNOWN = _Registry()


def register(*suffixes: str, beside: Callable[[Path], Sequence[Path]] | None = None) -> Callable[[Reader], Reader]:
    """Make a function the reader of all files whose names end in one of the suffixes, as ``".nii.gz"``.

    `FOLDER` stands for folders, and ``""`` for files whose names end in no known suffix.

    Args:
        suffixes: The suffixes.
        beside: Returns the other files that a file needs, for formats whose header lies in a file of its own.
    """

    def add(reader: Reader) -> Reader:
        _KNOWN.pictures.update(dict.fromkeys(suffixes, reader))
        if beside is not None:
            _KNOWN.beside.update(dict.fromkeys(suffixes, beside))
        return reader

    return add


def register_drawing(*suffixes: str) -> Callable[[DrawingReader], DrawingReader]:
    """Make a function the reader of masks in all files whose names end in one of the suffixes, as ``".json"``."""

    def add(reader: DrawingReader) -> DrawingReader:
        _KNOWN.drawings.update(dict.fromkeys(suffixes, reader))
        return reader

    return add


def files_of(path: Path) -> list[Path]:
    """Return all files that hold what a path names: those of a folder, or a header and its data.

    Raises:
        UserError: A header is damaged.
    """
    if path.is_dir():
        return sorted(item for item in path.iterdir() if item.is_file() and not item.name.startswith("."))
    suffix = _suffix(path, _KNOWN.beside)
    return [path] if suffix is None else [path, *_KNOWN.beside[suffix](path)]


def known_readers() -> tuple[dict[str, Reader], dict[str, DrawingReader]]:
    """Return the readers of pictures and those of drawings, by suffix."""
    return dict(_KNOWN.pictures), dict(_KNOWN.drawings)


def known_suffixes() -> list[str]:
    """Return the endings of file names that can be read, sorted."""
    return sorted({*_KNOWN.pictures, *_KNOWN.drawings} - {FOLDER, ""})


def reader_for(path: Path, role: Role = "image") -> Reader | DrawingReader:
    """Return the reader of a file or folder: the longest registered suffix wins.

    Raises:
        UserError: No format has this suffix.
    """
    tables: list[dict[str, Any]] = [_KNOWN.drawings, _KNOWN.pictures] if role == "mask" else [_KNOWN.pictures]
    for table in tables:
        suffix = _suffix(path, table)
        if suffix is not None:
            return table[suffix]
    raise UserError(f"{path}: no reader for '{path.suffix or path.name}' files; known: {', '.join(known_suffixes())}")


def _suffix(path: Path, table: dict[str, Any]) -> str | None:
    if path.is_dir():
        return FOLDER if FOLDER in table else None
    for suffix in sorted(table, key=len, reverse=True):
        if suffix != FOLDER and path.name.lower().endswith(suffix):
            # "" fits every name, but not one that has the suffix of an unknown format
            return suffix if suffix or not re.search(r"\.[A-Za-z]\w{0,4}$", path.name) else None
    return None


def check_options(image: Path, masks: Sequence[Path], options: dict[str, Any]) -> None:
    """Raise a `UserError` unless the reader of the image or that of a mask takes these options, with these types."""
    readers = {reader_for(image): image, **{reader_for(mask, "mask"): mask for mask in masks}}
    known = {name: hint for reader in readers for name, hint in _options(reader).items()}
    for name, value in options.items():
        if name not in known:
            raise _unknown_option(image, name, known)
        plain_value(known[name], value, str(image), f"reader.{name}")


def _check_names(path: Path, reader: Reader | DrawingReader, options: dict[str, Any]) -> None:
    known = _options(reader)
    for name in options:
        if name not in known:
            raise _unknown_option(path, name, known)


def _unknown_option(path: Path, name: str, known: dict[str, Any]) -> UserError:
    hint = nearest(name, known) or "; files of this format take no options"
    return UserError(f"{path}: unknown reader option '{name}'{hint}")


@functools.cache  # asked for several times for each of a million cases
def _options(reader: Reader | DrawingReader) -> dict[str, Any]:
    """Return the options of a reader with their types."""
    parameters = list(inspect.signature(reader, eval_str=True).parameters.values())[2:]
    return {item.name: item.annotation for item in parameters}


def own_options(path: Path, role: Role, options: dict[str, Any]) -> dict[str, Any]:
    """Return those of a spec's options that the reader of this file takes."""
    known = _options(reader_for(path, role))
    return {name: value for name, value in options.items() if name in known}


def read(path: str | Path, role: Role, **options: Any) -> Volume:
    """Read a volume and check its shape.

    Args:
        path: The file or folder; its suffix selects the reader.
        role: Whether the image or the mask of the file is meant.
        options: Options of the format, such as the keys of an npz file.

    Returns:
        The volume; for a mask (Z, Y, X) of labels or (Z, Y, X, 3) of colours, for an image (Z, Y, X) or (Z, Y, X, 3).

    Raises:
        UserError: The file is missing, unreadable, of no known format, or not a volume.
    """
    path = Path(path)
    _check_exists(path)
    reader = reader_for(path)
    _check_names(path, reader, options)
    volume = guarded(path, lambda: reader(path, role, **options))
    array = volume.array
    if not (array.ndim == 3 or (array.ndim == 4 and array.shape[-1] == 3)) or array.size == 0:
        raise UserError(f"{path}: the {role} has shape {array.shape}; a volume of slices (Z, Y, X) is needed")
    # Whole numbers, floats and booleans in the machine's byte order: what can be rescaled, stored and made a tensor.
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise UserError(f"{path}: the {role} holds values of type {array.dtype}; plain numbers are needed")
    if isinstance(array, Windowed):
        return volume
    return replace(volume, array=array.astype(array.dtype.newbyteorder("="), copy=False))


def read_drawing(path: str | Path, ground: Ground, **options: Any) -> Drawing:
    """Read what was drawn over an image: layers, or a label map as the one layer.

    Args:
        path: The mask's file or folder.
        ground: The image.
        options: Options of the format.

    Raises:
        UserError: The file is missing, unreadable, of no known format, or lies elsewhere than the image.
    """
    path = Path(path)
    _check_exists(path)
    reader = reader_for(path, "mask")
    if reader in _KNOWN.drawings.values():
        _check_names(path, reader, options)
        return guarded(path, lambda: reader(path, ground, **options))
    volume = read(path, "mask", **options)
    return Drawing((Layer(volume.array, name=path.name.partition(".")[0]),), volume=volume)


def fits_name(name: str, wanted: str) -> bool:
    """Whether a name is the wanted one, in which ``*`` is any text and ``?`` any character; case does not matter."""
    pattern = wanted.strip().casefold().replace("[", "[[]")  # a bracket is text
    return fnmatch.fnmatchcase(name.strip().casefold(), pattern)


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: no such file: correct the path or --root")


def guarded(path: Path, read: Callable[[], Any]) -> Any:
    """Call a reader; whatever a library raises on damaged bytes becomes one line that names the file."""
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # libraries raise many things on damaged bytes
        reason = re.sub(re.escape(str(path)), path.name, str(error).strip()) or "no reason given"
        raise UserError(f"{path}: cannot be read, is it complete? ({type(error).__name__}: {reason})") from error
