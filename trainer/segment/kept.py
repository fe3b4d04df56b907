"""Masks of a volume's objects as run lengths: a thousandth of their pixels.

Shapes: N objects, D slices, H W native height and width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from trainer.volumes.linking import SliceObjects


class KeptMasks:
    """The masks of N objects, slice by slice.

    Args:
        count: Number N of objects.
        size: Height and width (H, W) of a slice.
    """

    def __init__(self, count: int, size: tuple[int, int]) -> None:
        self.count, self.size = count, size
        self._slices: dict[int, SliceObjects] = {}

    def put(self, number: int, masks: np.ndarray, scores: np.ndarray | None = None) -> None:
        """Keep a slice's masks (N, H, W) bool, and how sure they are (N,)."""
        if masks.any():
            sure = np.ones(self.count, np.float32) if scores is None else scores
            self._slices[number] = SliceObjects.encoded(number, masks, sure)

    def masks(self, number: int) -> np.ndarray:
        """Masks of a slice: (N, H, W) bool."""
        kept = self._slices.get(number)
        if kept is None:
            return np.zeros((self.count, *self.size), bool)
        found: np.ndarray = coco_mask.decode(list(kept.rles)).transpose(2, 0, 1).astype(bool)
        return found

    def volume(self, place: int, depth: int) -> np.ndarray:
        """One object in the whole volume: (D, H, W) bool."""
        volume = np.zeros((depth, *self.size), bool)
        for number, kept in self._slices.items():
            volume[number] = coco_mask.decode(kept.rles[place])
        return volume

    def areas(self, place: int) -> dict[int, int]:
        """Pixels of one object in each slice that has any of it, ascending."""
        areas = {number: int(coco_mask.area(kept.rles[place])) for number, kept in self._slices.items()}
        return {number: areas[number] for number in sorted(areas) if areas[number]}

    def filled(self) -> list[int]:
        """Slices with anything in them, ascending."""
        return sorted(self._slices)

    def describe(self, place: int, name: str, spacing: tuple[float, float, float] | None, score: str) -> dict[str, Any]:
        """What was found of one object, as JSON.

        Args:
            place: The object's.
            name: What it is called.
            spacing: Millimetres between slices, rows and columns, where they are known.
            score: What the mean of its scores is called.
        """
        areas = self.areas(place)
        voxels = sum(areas.values())
        scores = [float(self._slices[number].confidences[place]) for number in areas]
        return {
            "name": name,
            "slices": len(areas),
            "first": min(areas, default=None),
            "last": max(areas, default=None),
            "voxels": voxels,
            "ml": None if spacing is None else round(float(np.prod(spacing)) * voxels / 1000, 4),
            score: round(float(np.mean(scores)), 4) if scores else None,
        }
