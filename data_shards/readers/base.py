"""What a reader is, and which one reads which file name.

Shapes: Z, Y, X are slices, rows and columns in LPS order.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_shards.errors import UserError, nearest

Role = Literal["image", "mask"]
"""What the caller wants of a file: formats that hold both in one file need to know."""


@dataclass(frozen=True)
class Volume:
    """A stack of slices in LPS order.

    Rows run anterior to posterior, columns from the patient's right to left, slices from inferior to superior, as in
    SimpleITK's array of an axial scan.

    Attributes:
        array: (Z, Y, X) grey or labels, or (Z, Y, X, 3) RGB, at native dtype.
        spacing: Distance between neighbours (z, y, x) in mm, or None if the file does not say.
        affine: (4, 4) from an index (x, y, z) of the array to mm in the scanner's frame, or None if the file does not
            say.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None
    affine: np.ndarray | None = None

    def apart(self, other: Volume) -> float:
        """Largest distance in mm between a corner voxel of two volumes of one shape; 0 if either has no place."""
        if self.affine is None or other.affine is None:
            return 0.0
        last = np.array(self.array.shape[2::-1]) - 1
        corners = np.array([[*(last * corner), 1.0] for corner in np.ndindex(2, 2, 2)])
        gaps = corners @ (self.affine - other.affine).T
        return float(np.sqrt((gaps[:, :3] ** 2).sum(axis=1)).max())


Reader = Callable[..., Volume]
"""Called as ``reader(path, role, **options)``; its keyword arguments are the options of its format."""

_READERS: dict[str, Reader] = {}


def register(*suffixes: str) -> Callable[[Reader], Reader]:
    """Make a function the reader of all files whose names end in one of the suffixes, as ``".nii.gz"``."""

    def add(reader: Reader) -> Reader:
        _READERS.update(dict.fromkeys(suffixes, reader))
        return reader

    return add


def known_suffixes() -> list[str]:
    """Return the endings of file names that can be read, sorted."""
    return sorted(_READERS)


def reader_for(path: Path) -> Reader:
    """Return the reader of a file name: the longest registered suffix wins.

    Raises:
        UserError: No format has this suffix.
    """
    for suffix in sorted(_READERS, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return _READERS[suffix]
    raise UserError(f"{path}: no reader for '{path.suffix or path.name}' files; known: {', '.join(known_suffixes())}")


def check_options(path: Path, options: dict[str, Any]) -> None:
    """Raise a `UserError` unless the reader of the file takes these options."""
    reader = reader_for(path)
    known = list(inspect.signature(reader).parameters)[2:]
    for name in options:
        if name not in known:
            hint = nearest(name, known) or "; files of this format take no options"
            raise UserError(f"{path}: unknown reader option '{name}'{hint}")


def read(path: str | Path, role: Role, **options: Any) -> Volume:
    """Read a volume and check its shape.

    Args:
        path: The file; its suffix selects the reader.
        role: Whether the image or the mask of the file is meant.
        options: Options of the format, such as the keys of an npz file.

    Returns:
        The volume; for a mask (Z, Y, X) of labels, for an image (Z, Y, X) or (Z, Y, X, 3).

    Raises:
        UserError: The file is missing, unreadable, of no known format, or not a volume.
    """
    path = Path(path)
    check_options(path, options)
    if not path.is_file():
        raise UserError(f"{path}: no such file: correct the path or --root")
    try:
        volume = reader_for(path)(path, role, **options)
    except UserError:
        raise
    except Exception as error:  # libraries raise many things on damaged bytes
        reason = re.sub(re.escape(str(path)), path.name, str(error).strip()) or "no reason given"
        raise UserError(f"{path}: cannot be read, is it complete? ({type(error).__name__}: {reason})") from error
    array = volume.array
    colour = role == "image" and array.ndim == 4 and array.shape[-1] == 3
    if not (array.ndim == 3 or colour) or array.size == 0:
        raise UserError(f"{path}: the {role} has shape {array.shape}; a volume of slices (Z, Y, X) is needed")
    # Whole numbers, floats and booleans in the machine's byte order: what can be rescaled, stored and made a tensor.
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise UserError(f"{path}: the {role} holds values of type {array.dtype}; plain numbers are needed")
    return replace(volume, array=array.astype(array.dtype.newbyteorder("="), copy=False))
