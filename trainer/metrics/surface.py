"""Distances between the surfaces of masks: in 2D, their outlines.

An outline runs through the corners between pixels. Around each corner lie 2 × 2 pixels; which of them are inside says
how much of the outline passes there (Nikolov et al. 2018, arXiv:1809.04430, section "Performance metrics"; the length
of an element is that of marching squares). A mask ends where its image ends.

Shapes: H W height and width, N elements of an outline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.spatial import KDTree


@dataclass(frozen=True)
class Outline:
    """A mask's outline, element by element.

    Attributes:
        corners: (N, 2) int64, row and column of the corner between pixels at which an element lies.
        lengths: (N,) float64, length of each element.
    """

    corners: np.ndarray
    lengths: np.ndarray


@lru_cache(maxsize=64)
def element_lengths(spacing: tuple[float, float]) -> np.ndarray:
    """Length of the outline in a square of 2 × 2 pixels, by which of them are inside: (16,) float64.

    The pixels a b / c d count 8, 4, 2, 1. The outline crosses the square between the midpoints of those sides whose two
    pixels differ.

    Args:
        spacing: Distance of rows and of columns.
    """
    height, width = spacing
    cut_corner = float(np.hypot(height, width)) / 2
    lengths = np.zeros(16)
    for code in range(16):
        a, b, c, d = (bool(code & bit) for bit in (8, 4, 2, 1))
        top, bottom, left, right = a != b, c != d, a != c, b != d
        if top and bottom:
            lengths[code] = 2 * cut_corner if left else height  # two opposite pixels, or a column
        elif left and right:
            lengths[code] = width
        elif top or bottom:
            lengths[code] = cut_corner
    return lengths


def outline(mask: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)) -> Outline:
    """Find a mask's outline.

    Args:
        mask: (H, W), nonzero inside.
        spacing: Distance of rows and of columns.
    """
    inside = (mask if mask.dtype == np.bool_ else mask != 0).view(np.uint8)
    rows = np.flatnonzero(inside.any(axis=1))
    if not rows.size:
        return Outline(np.zeros((0, 2), np.int64), np.zeros(0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(inside[top:bottom].any(axis=0))
    left, right = int(columns[0]), int(columns[-1]) + 1
    part = np.zeros((bottom - top + 2, right - left + 2), np.uint8)
    part[1:-1, 1:-1] = inside[top:bottom, left:right]
    pairs = part[:, :-1] * 2  # each corner's code from its four pixels: side by side first, then the rows
    pairs += part[:, 1:]
    codes = pairs[:-1] * 4
    codes += pairs[1:]
    found = np.flatnonzero((codes != 0) & (codes != 15))
    corners = np.stack(np.divmod(found, codes.shape[1]), axis=1) + np.array([top, left])
    return Outline(corners, element_lengths(spacing)[codes.ravel()[found]])


def distances(
    source: Outline, other: Outline, spacing: tuple[float, float] = (1.0, 1.0), reach: float = np.inf
) -> np.ndarray:
    """Distance of every element of an outline to the nearest one of another: (N,) float64.

    Args:
        source: The outline whose elements are looked at.
        other: The outline that they are measured to.
        spacing: Distance of rows and of columns.
        reach: Larger distances are infinite; a short one saves time. All are where the other outline is empty.
    """
    measured = np.full(len(source.corners), np.inf)
    if not len(source.corners) or not len(other.corners):
        return measured
    scale = np.asarray(spacing)
    tree = KDTree(other.corners * scale, balanced_tree=False, compact_nodes=False)
    # a little further, since rounding is not the tree's business: the distance is taken from whole numbers of pixels
    _, nearest = tree.query(source.corners * scale, distance_upper_bound=reach * (1 + 1e-6) + 1e-9)
    near = np.flatnonzero(nearest < len(other.corners))
    steps = (source.corners[near] - other.corners[nearest[near]]) * scale
    measured[near] = np.sqrt((steps**2).sum(axis=1))
    return measured


def nsd(prediction: np.ndarray, truth: np.ndarray, tolerance: float, spacing: Sequence[float] = (1.0, 1.0)) -> float:
    """Normalised surface Dice: the share of both outlines that lies within a tolerance of the other one.

    As PyPI ``surface-distance`` computes it, but 1 where prediction and truth are both empty; 0 where one is.

    Args:
        prediction: (H, W), nonzero inside.
        truth: (H, W), nonzero inside.
        tolerance: Largest distance that counts as none, in the unit of the spacing.
        spacing: Distance of rows and of columns.
    """
    scale = (float(spacing[0]), float(spacing[1]))
    predicted, true = outline(prediction, scale), outline(truth, scale)
    total = predicted.lengths.sum() + true.lengths.sum()
    if total == 0:
        return 1.0
    within = sum(
        one.lengths[distances(one, other, scale, tolerance) <= tolerance].sum()
        for one, other in ((predicted, true), (true, predicted))
    )
    return float(within / total)
