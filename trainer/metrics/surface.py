"""Distances between the surfaces of masks: in 2D, their outlines.

An outline runs through the corners between pixels. Around each corner lie 2 × 2 pixels, in 3D 2 × 2 × 2 voxels; which
of them are inside says how much of the outline or surface passes there (Nikolov et al. 2018, arXiv:1809.04430, section
"Performance metrics"; the size of an element is that of marching squares and cubes). A mask ends where its image ends.

Shapes: D H W depth, height and width, d dimensions (2 or 3), N elements of an outline.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.spatial import KDTree


@dataclass(frozen=True)
class Outline:
    """A mask's outline or surface, element by element.

    Attributes:
        corners: (N, d) int64, (slice,) row and column of the corner between pixels at which an element lies.
        lengths: (N,) float64, length of each element; in 3D its area.
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


_CUBE = tuple(itertools.product((0, 1), repeat=3))
"""The places of 2 × 2 × 2 voxels: the n-th counts 2^(7 − n) in a code."""


@lru_cache(maxsize=64)
def element_areas(spacing: tuple[float, float, float]) -> np.ndarray:
    """Area of the surface in a cube of 2 × 2 × 2 voxels, by which of them are inside: (256,) float64.

    As marching cubes, with the middles of those edges whose two voxels differ. Of the inside and the outside the
    smaller part is cut off, each of its pieces, connected along edges, by itself.

    Args:
        spacing: Distance of slices, of rows and of columns.
    """
    areas = np.zeros(256)
    for code in range(256):
        inside = {place for number, place in enumerate(_CUBE) if code & 128 >> number}
        if len(inside) > 4:
            inside = set(_CUBE) - inside
        areas[code] = sum(_cut_off(piece, np.asarray(spacing)) for piece in _pieces(inside))
    return areas


def _pieces(places: set[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Places of a cube in pieces that are connected along its edges."""
    pieces: list[list[tuple[int, ...]]] = []
    left = sorted(places)
    while left:
        piece = [left.pop()]
        for place in piece:  # grows in the loop
            beside = [other for other in left if _apart(place, other) == 1]
            piece += beside
            left = [other for other in left if other not in beside]
        pieces.append(piece)
    return pieces


def _apart(place: tuple[int, ...], other: tuple[int, ...]) -> int:
    return sum(a != b for a, b in zip(place, other, strict=True))


def _cut_off(piece: list[tuple[int, ...]], spacing: np.ndarray) -> float:
    """Area of the surface that cuts one to four connected corners off a cube.

    It is made of triangles and rectangles whose normals have a few directions only: along an axis, between two axes,
    and along the cube's diagonals.
    """
    pairs = [(a, b) for a, b in itertools.combinations(piece, 2) if _apart(a, b) == 1]
    axes = [int(np.flatnonzero(np.subtract(*pair))[0]) for pair in pairs]
    faces = spacing.prod() / spacing
    """Area of the cube's face across each axis."""
    diagonal = float(np.linalg.norm(faces))

    def along(axis: int) -> float:
        return float(np.linalg.norm(np.delete(faces, axis)))

    if len(piece) == 1:
        return diagonal / 8
    if len(piece) == 2:
        return along(axes[0]) / 2
    across = sum({0, 1, 2} - set(axes))  # where all corners lie in one face
    if len(piece) == 3:
        return float(faces[across]) / 2 + diagonal * 3 / 8
    if len(pairs) == 4:
        return float(faces[across])
    degrees = [sum(place in pair for pair in pairs) for place in piece]
    if 3 in degrees:  # a corner and its three neighbours: a hexagon
        return diagonal * 6 / 8
    ends = [axis for axis, pair in zip(axes, pairs, strict=True) if any(degrees[piece.index(p)] == 1 for p in pair)]
    return diagonal / 2 + sum(along(axis) for axis in ends) / 4  # a chain: a bent hexagon, in four triangles


def outline(mask: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0)) -> Outline:
    """Find a mask's outline, or its surface in 3D.

    Args:
        mask: (H, W) or (D, H, W), nonzero inside.
        spacing: Distance of (slices,) rows and columns.
    """
    inside = (mask if mask.dtype == np.bool_ else mask != 0).view(np.uint8)
    box = extent(inside)
    if box is None:
        return Outline(np.zeros((0, mask.ndim), np.int64), np.zeros(0))
    codes = np.zeros([side.stop - side.start + 2 for side in box], np.uint8)
    codes[(slice(1, -1),) * mask.ndim] = inside[box]
    factor = 2
    for axis in reversed(range(mask.ndim)):  # a corner's code from its pixels: side by side first, then the rows
        ahead = (slice(None),) * axis
        pairs = codes[(*ahead, slice(None, -1))] * np.uint8(factor)
        pairs += codes[(*ahead, slice(1, None))]
        codes, factor = pairs, factor**2
    found = np.flatnonzero((codes != 0) & (codes != factor - 1))
    corners = np.stack(np.unravel_index(found, codes.shape), axis=1) + np.array([side.start for side in box])
    sizes = element_lengths(spacing) if len(spacing) == 2 else element_areas(spacing)
    return Outline(corners, sizes[codes.ravel()[found]])


def extent(mask: np.ndarray) -> tuple[slice, ...] | None:
    """The part of a mask that holds all of what is inside, axis by axis; None where nothing is."""
    box: tuple[slice, ...] = ()
    for axis in range(mask.ndim):
        rest = tuple(other for other in range(mask.ndim) if other != axis)
        places = np.flatnonzero(mask[box].any(axis=rest))
        if not places.size:
            return None
        box += (slice(int(places[0]), int(places[-1]) + 1),)
    return box


def distances(
    source: Outline, other: Outline, spacing: tuple[float, ...] = (1.0, 1.0), reach: float = np.inf
) -> np.ndarray:
    """Distance of every element of an outline to the nearest one of another: (N,) float64.

    Args:
        source: The outline whose elements are looked at.
        other: The outline that they are measured to.
        spacing: Distance of (slices,) rows and columns.
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


def measure(
    prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0), reach: float = np.inf
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Measure the distances between the outlines or surfaces of two masks.

    Args:
        prediction: (H, W) or (D, H, W), nonzero inside.
        truth: As large, nonzero inside.
        spacing: Distance of (slices,) rows and columns.
        reach: Larger distances are infinite; a short one saves time.

    Returns:
        Of the prediction, then of the truth: sizes (N,) of its elements, and their distances (N,) to the other one.

    Raises:
        ValueError: The shapes differ, or the spacing has another number of axes.
    """
    if prediction.shape != truth.shape or truth.ndim != len(spacing) or truth.ndim not in (2, 3):
        raise ValueError(
            f"expected two masks of one size and its spacing, got {prediction.shape}, {truth.shape}, {spacing}"
        )
    predicted, true = outline(prediction, spacing), outline(truth, spacing)
    ways = ((predicted, true), (true, predicted))
    return [(one.lengths, distances(one, other, spacing, reach)) for one, other in ways]


def nsd(prediction: np.ndarray, truth: np.ndarray, tolerance: float, spacing: Sequence[float] = (1.0, 1.0)) -> float:
    """Normalised surface Dice: the share of both outlines or surfaces that lies within a tolerance of the other one.

    As PyPI ``surface-distance`` computes it, but 1 where prediction and truth are both empty; 0 where one is.

    Args:
        prediction: (H, W) or (D, H, W), nonzero inside.
        truth: As large, nonzero inside.
        tolerance: Largest distance that counts as none, in the unit of the spacing.
        spacing: Distance of (slices,) rows and columns.

    Raises:
        ValueError: The shapes differ, or the spacing has another number of axes.
    """
    return share_within(measure(prediction, truth, tuple(map(float, spacing)), tolerance), tolerance)


def hd95(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float] = (1.0, 1.0)) -> float:
    """95 % Hausdorff distance: 95 % of each outline or surface lies within it of the other one.

    As PyPI ``surface-distance`` computes it, by length or area of the outline and not by its number of pixels, but 0
    where prediction and truth are both empty; infinite where one is.

    Args:
        prediction: (H, W) or (D, H, W), nonzero inside.
        truth: As large, nonzero inside.
        spacing: Distance of (slices,) rows and columns; its unit is that of the result.

    Raises:
        ValueError: The shapes differ, or the spacing has another number of axes.
    """
    return robust_hausdorff(measure(prediction, truth, tuple(map(float, spacing))))


def share_within(measured: Sequence[tuple[np.ndarray, np.ndarray]], tolerance: float) -> float:
    """Which share of two surfaces lies within a tolerance of the other one; 1 where both are empty.

    Args:
        measured: What `measure` found.
        tolerance: Largest distance that counts as none.
    """
    total = sum(sizes.sum() for sizes, _ in measured)
    if total == 0:
        return 1.0
    return float(sum(sizes[away <= tolerance].sum() for sizes, away in measured) / total)


def robust_hausdorff(measured: Sequence[tuple[np.ndarray, np.ndarray]], share: float = 0.95) -> float:
    """The distance within which a share of each of two surfaces lies of the other one, the larger of both.

    As PyPI ``surface-distance``'s robust Hausdorff distance, but 0 where both are empty; infinite where one is.

    Args:
        measured: What `measure` found, without a reach.
        share: Of the surface; 0.95 gives HD95.
    """
    lengths = [len(sizes) for sizes, _ in measured]
    if not all(lengths):
        return float("inf") if any(lengths) else 0.0
    found = []
    for sizes, away in measured:
        order = np.argsort(away)
        within = np.cumsum(sizes[order]) / sizes.sum()
        place = min(int(np.searchsorted(within, share)), len(order) - 1)
        found.append(float(away[order[place]]))
    return max(found)
