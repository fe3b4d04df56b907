"""NumPy ``.npz`` with image, mask and spacing under named keys, as MedSAM's and MedSAM2's tools write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_shards.errors import UserError, nearest
from data_shards.readers.base import Role, Volume, register


@register(".npz")
def read_npz(
    path: Path, role: Role, image_key: str = "imgs", mask_key: str = "gts", spacing_key: str = "spacing"
) -> Volume:
    """Read one array of an npz file. Arrays are taken as (Z, Y, X) already; nothing is turned.

    Of a picture, labels (Y, X) with an image (Y, X) or (Y, X, 3), they become the one slice.

    Args:
        path: The file.
        role: Selects between the two keys.
        image_key: Key of the image.
        mask_key: Key of the labels.
        spacing_key: Key of the spacing (x, y, z) in mm; may be absent from the file.

    Raises:
        UserError: The key is missing.
    """
    key = image_key if role == "image" else mask_key
    with np.load(path, allow_pickle=False) as content:
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise UserError(f"{path}: holds a bare array, not an npz archive: write it with numpy.savez")
        if key not in content.files:
            hint = nearest(key, content.files) or "; the file is empty"
            raise UserError(f"{path}: no array '{key}' (its arrays: {', '.join(sorted(content.files))}){hint}")
        array = content[key]
        spacing = None
        if spacing_key in content.files:
            values = np.asarray(content[spacing_key], dtype=float).ravel()
            if values.size != 3:
                raise UserError(f"{path}: '{spacing_key}' has {values.size} numbers, expected (x, y, z)")
            x, y, z = (float(value) for value in values)
            spacing = (z, y, x)
        flat = array.ndim == 2 or (array.shape[2:] == (3,) and _has_flat_labels(content, mask_key))
    return Volume(array[np.newaxis] if flat else array, spacing, flat=flat)


def _has_flat_labels(content: Mapping[str, np.ndarray], mask_key: str) -> bool:
    """Whether the labels are (Y, X), so that an image (Y, X, 3) has three channels, and not three columns."""
    return mask_key in content and content[mask_key].ndim == 2
