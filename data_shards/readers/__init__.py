"""Readers of images and of what was drawn on them, one file per format.

To add a format, write a module with a function marked ``@register(".suffix")`` (a file is an image or a label map) or
``@register_drawing(".suffix")`` (a file says what was drawn over an image), and import it below.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_shards.readers import coco, dicom, images, nifti, npz, sitk, slides
from data_shards.readers.base import (
    Drawing,
    Ground,
    Layer,
    Volume,
    Windowed,
    check_options,
    files_of,
    fits_name,
    known_suffixes,
    own_options,
    read,
    read_drawing,
)


def read_volume(path: str | Path, **options: Any) -> Volume:
    """Read an image (Z, Y, X) or (Z, Y, X, 3); see `read`."""
    return read(path, "image", **options)


def read_mask(path: str | Path, **options: Any) -> Volume:
    """Read a label map (Z, Y, X) or a picture in colours (Z, Y, X, 3); see `read`."""
    return read(path, "mask", **options)
