"""Readers of volumes, one file per format.

To add a format, write a module with a function marked ``@register(".suffix")`` and import it below.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_shards.readers import nifti, npz
from data_shards.readers.base import Volume, check_options, known_suffixes, read


def read_volume(path: str | Path, **options: Any) -> Volume:
    """Read an image volume (Z, Y, X) or (Z, Y, X, 3) in LPS order; see `read`."""
    return read(path, "image", **options)


def read_mask(path: str | Path, **options: Any) -> Volume:
    """Read a label volume (Z, Y, X) in LPS order; see `read`."""
    return read(path, "mask", **options)
