"""From polygons to masks.

Shapes: N corners of a polygon, H, W rows and columns of the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fill(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Return which pixels have their centre inside an odd number of times, over all polygons together.

    A polygon inside another is thus a hole. A centre on an edge is inside if the area lies to its right or below, so
    that neighbours that share an edge neither overlap nor leave a gap.

    Args:
        polygons: Closed polygons, each (N, 2) corners (x, y) in pixels; pixel (row 0, column 0) has its centre at 0, 0.
        height: Rows.
        width: Columns.

    Returns:
        (H, W) bool.
    """
    rings = [np.asarray(polygon, dtype=float).reshape(-1, 2) for polygon in polygons]
    if not rings:
        return np.zeros((height, width), bool)
    start, end = np.concatenate(rings), np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    # Drawn upwards or downwards, an edge passes a row at the very same place.
    down = (start[:, 1] <= end[:, 1])[:, None]
    (x0, y0), (x1, y1) = np.where(down, start, end).T, np.where(down, end, start).T
    top, bottom = (np.clip(np.ceil(y), 0, height).astype(np.int64) for y in (y0, y1))
    # Every edge toggles, in each row whose centre it passes, all pixels from where it passes to the right end.
    counts = bottom - top
    edge = np.repeat(np.arange(len(counts)), counts)
    row = top[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    x = x0[edge] + (row - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    column = np.clip(np.ceil(x), 0, width).astype(np.int64)
    toggles = np.bincount(row * (width + 1) + column, minlength=height * (width + 1))
    return (np.cumsum(toggles.reshape(height, width + 1)[:, :width], axis=1) & 1).astype(bool)
