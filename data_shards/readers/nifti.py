"""NIfTI-1 and -2: ``.nii`` and ``.nii.gz``.

Heavy libraries are imported by the functions that use them, so that ``--help`` stays fast.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import UserError
from data_shards.readers.axes import pick_channels, turn_to_lps
from data_shards.readers.base import Role, Volume, register


@register(".nii", ".nii.gz")
def read_nifti(path: Path, role: Role, channels: list[int] | None = None) -> Volume:
    """Read a NIfTI file and turn it to LPS by the nearest right-angled rotation of its affine; nothing is resampled.

    Values keep their dtype unless the header scales them (``scl_slope``, ``scl_inter``), which gives float32.

    Args:
        path: The file.
        role: Of a mask, the whole file is taken.
        channels: Which channels of an image with a fourth axis, from 0: one, or three to become red, green and blue.

    Raises:
        UserError: The affine does not say which way is up, or there are several channels and none were chosen.
    """
    image = _load(path)
    array = _stored_values(image.dataobj)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 4 and role == "image" and channels is not None:
        array = pick_channels(path, array, channels)
    elif array.ndim != 3:
        hint = "" if role == "mask" or array.ndim != 4 else " (or choose one, as in reader: {channels: [0]})"
        raise UserError(f"{path}: the {role} has shape {array.shape}; a volume of slices (Z, Y, X) is needed{hint}")
    if array.dtype.names:  # RGB is stored as a record of bytes
        array = np.stack([array[name] for name in array.dtype.names[:3]], axis=-1)
    return turn_to_lps(path, array, image.affine)


def _load(path: Path) -> Any:
    """Return nibabel's image of a file."""
    import nibabel

    with quiet():
        if not path.name.lower().endswith(".gz"):
            return nibabel.load(path)
        # nibabel stops before the checksum at the end of a gzip file: unpacked whole, damage is found.
        data = gzip.decompress(path.read_bytes())
        second = 540 in (int.from_bytes(data[:4], "little"), int.from_bytes(data[:4], "big"))
        return (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_bytes(data)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep nibabel from logging what it mends in a header: the lines do not name the file, and the rest it raises."""
    from nibabel.imageglobals import logger

    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _stored_values(proxy: Any) -> np.ndarray:
    """Return the values (X, Y, Z, …) in the machine's byte order, scaled only if the header says so."""
    if proxy.slope == 1 and proxy.inter == 0:
        array: np.ndarray = np.asanyarray(proxy.get_unscaled())
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.asarray(proxy, dtype=np.float32)
