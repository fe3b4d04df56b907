"""Objects of a volume as arrays, and the file that they are kept in.

Shapes: D slices, M objects in a slice, N objects in a volume, H W height and width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.volumes.linking import SliceObjects, paint


@dataclass(frozen=True)
class VolumeObjects:
    """The objects of one term in a volume.

    Attributes:
        labels: (D, H, W) numbers of the objects from 1, 0 where there is none, in the smallest unsigned type.
        confidence: (N,) float32, mean confidence of each object over its slices.
    """

    labels: np.ndarray
    confidence: np.ndarray

    @classmethod
    def of(cls, slices: Sequence[SliceObjects], numbers: Sequence[np.ndarray], size: tuple[int, int]) -> VolumeObjects:
        """Paint the objects of each slice.

        Args:
            slices: D slices.
            numbers: For each (M,) numbers of its objects, from 1 without holes; 0 is left out.
            size: Height and width (H, W).
        """
        every = np.concatenate([np.zeros(0, np.int64), *numbers])
        count = int(every.max(initial=0))
        labels = np.zeros((len(slices), *size), dtype=np.min_scalar_type(count))
        for place, (objects, some) in enumerate(zip(slices, numbers, strict=True)):
            labels[place] = paint(objects, some, size)
        confidences = np.concatenate([np.zeros(0), *(objects.confidences for objects in slices)])
        sums, times = (np.bincount(every, weights, count + 1)[1:] for weights in (confidences, np.ones(len(every))))
        return cls(labels, (sums / np.maximum(times, 1)).astype(np.float32))

    def describe(self, spacing: tuple[float, float, float]) -> dict[str, Any]:
        """Counts for ``volumes.json``; millilitres where the spacing (slices, rows, columns), in mm, is known."""
        voxels = int((self.labels > 0).sum())
        volume = float(np.prod(spacing)) * voxels / 1000
        return {
            "objects": len(self.confidence),
            "voxels": voxels,
            "ml": None if np.isnan(volume) else round(volume, 4),
        }


def runs(indices: Sequence[int], gap: int) -> list[list[int]]:
    """Cut numbers of slices, ascending, where more than `gap` in a row are missing."""
    cuts = [0, *(np.flatnonzero(np.diff(indices) > gap + 1) + 1).tolist(), len(indices)]
    return [list(indices[start:stop]) for start, stop in itertools.pairwise(cuts)]


def write_volume(
    path: Path,
    terms: Mapping[str, VolumeObjects],
    slice_index: Sequence[int],
    spacing: tuple[float, float, float],
    axis: str,
) -> None:
    """Write ``DATASET-VOLUME.npz``, whole or not at all; nothing in it needs pickle.

    Args:
        path: The file.
        terms: Objects by term.
        slice_index: (D,) numbers of the slices along their axis.
        spacing: Millimetres between slices, rows and columns; NaN where it is not known.
        axis: Anatomical plane of the slices.
    """
    arrays: dict[str, Any] = {
        "terms": np.array(list(terms), dtype=np.str_),
        "slice_index": np.array(slice_index, dtype=np.int64),
        "spacing": np.array(spacing, dtype=np.float64),
        "axis": np.array(axis, dtype=np.str_),
    }
    for number, objects in enumerate(terms.values()):
        arrays |= {f"labels_{number}": objects.labels, f"confidence_{number}": objects.confidence}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as handle:
        np.savez_compressed(handle, **arrays)
    temporary.replace(path)
