"""Masks of neighbouring slices become objects: those that overlap most are the same one.

Shapes: M objects in a slice, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment


@dataclass(frozen=True)
class SliceObjects:
    """What was found of one term in one slice.

    Attributes:
        index: Number of the slice along its axis.
        rles: M masks, run-length encoded as COCO does it: a thousand times smaller than their pixels.
        confidences: (M,) in [0, 1].
    """

    index: int
    rles: tuple[dict[str, Any], ...]
    confidences: np.ndarray

    @classmethod
    def encoded(cls, index: int, masks: np.ndarray, confidences: np.ndarray) -> SliceObjects:
        """Of masks (M, H, W) bool."""
        rles = tuple(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks)
        return cls(index, rles, confidences)

    def subset(self, places: Sequence[int]) -> SliceObjects:
        """Some of the objects."""
        return SliceObjects(self.index, tuple(self.rles[place] for place in places), self.confidences[list(places)])


def overlaps(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> np.ndarray:
    """Intersection over union of M and N encoded masks of one size: (M, N) float64."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    return np.asarray(coco_mask.iou(list(first), list(second), [0] * len(second)))


def distinct(found: SliceObjects, same: float) -> list[int]:
    """Of answers that are one object twice choose the more confident one; empty masks are left out.

    Args:
        found: The answers.
        same: IoU above which two of them are the same object, in [0, 1].

    Returns:
        Places of those that stay, the most confident first.
    """
    iou = overlaps(found.rles, found.rles)
    kept: list[int] = []
    for place in np.argsort(-found.confidences, kind="stable").tolist():
        if coco_mask.area(found.rles[place]) and not any(iou[place, better] > same for better in kept):
            kept.append(place)
    return kept


def link(
    slices: Sequence[SliceObjects], least_overlap: float = 0.3, gap: int = 1, min_slices: int = 1
) -> list[np.ndarray]:
    """Number the objects of one term through its slices.

    Two masks are one object where they overlap by at least `least_overlap`; they are paired so that they overlap most
    in sum (Hungarian), each with one at most. Objects of the slice before come first, and what they leave is tried
    with objects that were last seen further back. What finds no partner begins an object; where one splits, the part
    that overlaps it more goes on with its number.

    Args:
        slices: In ascending order of their index; a slice that is missing counts as one where nothing was found.
        least_overlap: Smallest IoU of two masks of one object, above 0.
        gap: Most slices in a row in which an object may not be found and go on after.
        min_slices: Objects found in fewer slices get no number.

    Returns:
        For each slice (M,) int64: numbers of the objects, from 1 in the order of their appearance; 0 is none.
    """
    last: dict[int, tuple[int, dict[str, Any]]] = {}
    numbered, begun = [], 0
    for found in slices:
        numbers = np.zeros(len(found.rles), dtype=np.int64)
        for away in range(1, gap + 2):
            taken = set(numbers.tolist())
            known = [n for n, (index, _) in last.items() if found.index - index == away and n not in taken]
            free = np.flatnonzero(numbers == 0)
            iou = overlaps([found.rles[place] for place in free], [last[n][1] for n in known])
            iou[iou < least_overlap] = 0
            for row, column in zip(*linear_sum_assignment(iou, maximize=True), strict=True):
                if iou[row, column]:
                    numbers[free[row]] = known[column]
        for place in np.flatnonzero(numbers == 0):
            begun += 1
            numbers[place] = begun
        last |= {int(n): (found.index, rle) for n, rle in zip(numbers, found.rles, strict=True)}
        last = {n: seen for n, seen in last.items() if found.index - seen[0] <= gap}
        numbered.append(numbers)
    return renumbered(numbered, min_slices)


def renumbered(numbered: Sequence[np.ndarray], min_slices: int = 1) -> list[np.ndarray]:
    """Leave out objects that are in too few slices, and number the others from 1 without holes.

    Args:
        numbered: For each slice (M,) numbers of different objects; 0 is none.
        min_slices: Smallest number of slices that an object is in.
    """
    slices_of = np.bincount(np.concatenate([np.zeros(1, np.int64), *numbered]))
    kept = slices_of >= min_slices
    kept[0] = False
    kept &= slices_of > 0
    new = np.where(kept, np.cumsum(kept), 0)
    return [new[numbers] for numbers in numbered]


def paint(found: SliceObjects, numbers: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Put the objects of one slice into one picture; where several are, the most confident one is seen.

    Args:
        found: The objects.
        numbers: (M,) their numbers; 0 is left out.
        size: Height and width (H, W).

    Returns:
        (H, W) int64, 0 where there is none.
    """
    picture = np.zeros(size, dtype=np.int64)
    for place in np.argsort(found.confidences, kind="stable"):
        if numbers[place]:
            picture[coco_mask.decode(found.rles[place]) != 0] = numbers[place]
    return picture
