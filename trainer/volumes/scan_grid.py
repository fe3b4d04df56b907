"""How the array of a file lies in LPS order: scans are read, and label maps written, through one view.

Shapes: I, J, K as the file orders its axes, the first running fastest; D slices, H W height and width.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.preprocessing import Axis, slices_of
from data_shards.readers import Volume
from data_shards.readers.axes import Turn


@dataclass(frozen=True)
class Grid:
    """The grid of a file.

    Attributes:
        path: The file or folder, for messages.
        shape: (I, J, K).
        affine: (4, 4) from an index (i, j, k) to mm in NIfTI's frame; None where the file does not say, and its array
            is taken as it is.
        even: Whether the slices lie at even distances: if not, the affine is that of their mean.
    """

    path: Path
    shape: tuple[int, int, int]
    affine: np.ndarray | None = None
    even: bool = True

    def turn(self) -> Turn:
        """Return the rotation to LPS.

        Raises:
            UserError: The affine does not say which way is up.
        """
        if self.affine is None:
            return Turn(np.array([[0, 1], [1, 1], [2, 1]]))
        return Turn.of(self.path, self.affine)

    def volume(self, array: np.ndarray) -> np.ndarray:
        """View an array (I, J, K, …) as the volume (Z, Y, X, …) in LPS order; writing into one changes the other."""
        return self.turn().view(array)

    def slices(self, array: np.ndarray, axis: Axis) -> np.ndarray:
        """View an array (I, J, K, …) as its slices (D, H, W, …) along an axis."""
        return slices_of(self.volume(array), axis)

    def spacing(self) -> tuple[float, float, float] | None:
        """Return the distances (z, y, x) of the volume's voxels in mm, or None."""
        return None if self.affine is None else self.turn().spacing(self.affine)

    def zeros(self) -> np.ndarray:
        """Return (I, J, K) of zeros that take no memory and cannot be written to."""
        return np.broadcast_to(np.uint8(0), self.shape)

    def blank(self, flat: bool = False, frame: str | None = None, files: tuple[Path, ...] = ()) -> Volume:
        """Return a volume of zeros in this place that takes no memory, on which drawings can be laid."""
        affine = None if self.affine is None else self.turn().affine(self.affine, self.shape)
        return Volume(self.volume(self.zeros()), self.spacing(), affine, flat, frame, files)


def volume_axis(axis: Axis) -> int:
    """Return along which axis of a volume (Z, Y, X) slices are counted."""
    return typing.get_args(Axis).index(axis)
