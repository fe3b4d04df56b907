"""The axes of an array: which way they run in the patient, and which of them holds channels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.errors import UserError
from data_shards.readers.base import Volume


@dataclass(frozen=True)
class Turn:
    """The nearest right-angled rotation of a file's axes to LPS.

    Attributes:
        orientation: (3, 2), row i for file axis i: which of x, y, z it becomes, and -1 if it is turned round.
    """

    orientation: np.ndarray

    @classmethod
    def of(cls, path: Path, affine: np.ndarray) -> Turn:
        """Find it; see `turn_to_lps`."""
        from nibabel import orientations

        # A singular affine leaves an axis without a direction.
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise UserError(f"{path}: its affine is not invertible, so its orientation is unknown: repair the header")
        return cls(orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt("LPS")))

    def view(self, array: np.ndarray) -> np.ndarray:
        """View an array (X, Y, Z, …), as the file orders its axes, as (Z, Y, X, …) in LPS order."""
        from nibabel import orientations

        turned = orientations.apply_orientation(array, self.orientation)
        return turned.transpose(2, 1, 0, *range(3, array.ndim))

    def affine(self, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return the affine of the turned array: from its index (x, y, z) to mm; `shape` is the file's (X, Y, Z)."""
        from nibabel import orientations

        return affine @ orientations.inv_ornt_aff(self.orientation, shape)

    def spacing(self, affine: np.ndarray) -> tuple[float, float, float]:
        """Return the distances (z, y, x) of neighbours of the turned array, in mm."""
        zooms = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
        x, y, z = (float(value) for value in zooms[np.argsort(self.orientation[:, 0])])
        return z, y, x


def turn_to_lps(path: Path, array: np.ndarray, affine: np.ndarray) -> Volume:
    """Turn an array to LPS by the nearest right-angled rotation of its affine; nothing is resampled.

    Args:
        path: The file, for messages.
        array: (X, Y, Z) or (X, Y, Z, C), as the file orders its axes.
        affine: (4, 4) from an index (x, y, z) to mm, axes running to the patient's right, front and head (RAS), as in
            NIfTI.

    Returns:
        The volume, (Z, Y, X) or (Z, Y, X, C); its affine is in the same frame.

    Raises:
        UserError: The affine does not say which way is up.
    """
    turn = Turn.of(path, affine)
    return Volume(np.ascontiguousarray(turn.view(array)), turn.spacing(affine), turn.affine(affine, array.shape[:3]))


def pick_channels(path: Path, array: np.ndarray, channels: list[int] | None) -> np.ndarray:
    """Return an image of one or three channels.

    Args:
        path: The file, for messages.
        array: (…, C).
        channels: Which channels, from 0: one, or three to become red, green and blue; None takes all.

    Returns:
        (…) for one channel, or (…, 3).

    Raises:
        UserError: There is no such channel, or the number of them is neither one nor three.
    """
    count = array.shape[-1]
    if channels is None:
        if count not in (1, 3):
            raise UserError(
                f"{path}: has {count} channels, of which an image takes one or three: "
                "choose them, as in reader: {channels: [0]} or {channels: [2, 1, 0]}"
            )
        channels = list(range(count))
    if len(channels) not in (1, 3):
        raise UserError(f"{path}: channels: one or three are needed, got {len(channels)}")
    for channel in channels:
        if not 0 <= channel < count:
            raise UserError(f"{path}: channels: there is no channel {channel}, only 0 to {count - 1}")
    if channels == list(range(count)):
        return array if count == 3 else array[..., 0]
    return np.ascontiguousarray(array[..., channels[0] if len(channels) == 1 else channels])
