"""Prompts that are off: boxes and points moved at random, alike for all models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from zlib import crc32

import numpy as np

from data_shards.seed import stream
from trainer.volumes.asked import Asked, tight_box

SEED = 0
"""Of the noise: evaluations compare only if all of them are asked alike."""


def moved(one: Asked, mask: np.ndarray, level: float, about: tuple[str, str, int]) -> Asked:
    """A prompt that is off: each side of its box, or its point, moved by up to `level` percent of the box's sides.

    Directions are uniform (as SAM2 draws them in training, up to 10 % there), and the same at every level and for every
    model: the object alone says them. A side stays within the image; a point may come to lie beside its object.

    Args:
        one: A box or points.
        mask: The object (H, W) bool, whose tight box says how large it is where a point is shown.
        level: Percent.
        about: Case, term and position of the target.
    """
    box = one.box or tight_box(mask)
    if not level or box is None:
        return one
    case, term, target = about
    ways = stream(SEED, "prompt_noise", crc32(case.encode()), crc32(term.encode()), target + 1).uniform(-1, 1, 4)
    height, width = mask.shape
    sides = np.array([box[2] - box[0] + 1, box[3] - box[1] + 1] * 2)
    steps = ways * sides * level / 100
    last = np.array([width - 1, height - 1])
    if one.box is not None:
        corners = np.clip((np.array(one.box) + steps).reshape(2, 2), 0, last)
        low, high = corners.min(0), corners.max(0)  # much noise can swap the sides of a box
        return replace(one, box=(float(low[0]), float(low[1]), float(high[0]), float(high[1])))
    return replace(one, points=tuple(_step(point, steps[:2], last) for point in one.points))


def _step(point: Sequence[float], step: np.ndarray, last: np.ndarray) -> tuple[float, float, int]:
    x, y = np.clip(np.array(point[:2]) + step, 0, last)
    return float(x), float(y), int(point[2])
