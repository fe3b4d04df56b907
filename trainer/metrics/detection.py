"""Which lesions were found: scores by lesion and not by voxel.

A lesion is a connected piece of a mask, pieces that touch at a corner being one. Each true lesion gets at most one
predicted piece and each piece at most one lesion; pairs whose intersection over union (IoU) is too small are none, and
of the others the sum of IoU is the largest possible (Hungarian matching, as Metrics Reloaded, Maier-Hein et al. 2024,
recommends). So a piece that covers two lesions has found one of them, and of two pieces of one lesion one is false:
that would stay hidden if every piece that touches a lesion counted.

Shapes: D H W depth, height and width, d dimensions (2 or 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.metrics.surface import extent

OVERLAP = 0.1
"""Smallest IoU of a lesion that was found: enough to point a reader to it, as in PI-CAI (Saha et al. 2024)."""


@dataclass(frozen=True)
class Lesion:
    """One true lesion.

    Attributes:
        size: Its volume or area, in the unit of the spacing.
        found: Whether a predicted piece belongs to it.
        dice: Dice similarity coefficient with that piece; 0 where it was missed.
        iou: Intersection over union with that piece; 0 where it was missed.
    """

    size: float
    found: bool
    dice: float
    iou: float


@dataclass(frozen=True)
class Detection:
    """Which lesions were found, of one case or of several (`pool`).

    Attributes:
        lesions: Every true lesion, in the order of its first voxel.
        false_sizes: Volume or area of each predicted piece that belongs to no lesion, in that order too.
    """

    lesions: tuple[Lesion, ...]
    false_sizes: tuple[float, ...]

    @property
    def true_positives(self) -> int:
        """Number of lesions that were found."""
        return sum(lesion.found for lesion in self.lesions)

    @property
    def misses(self) -> int:
        """Number of lesions that were not found."""
        return len(self.lesions) - self.true_positives

    @property
    def false_positives(self) -> int:
        """Number of predicted pieces that belong to no lesion."""
        return len(self.false_sizes)

    @property
    def sensitivity(self) -> float | None:
        """Share of the lesions that were found; None where there are none."""
        return _share(self.true_positives, len(self.lesions))

    @property
    def precision(self) -> float | None:
        """Share of the predicted pieces that belong to a lesion; None where nothing was predicted."""
        return _share(self.true_positives, self.true_positives + self.false_positives)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of sensitivity and precision; None where there are neither lesions nor predicted pieces."""
        return _share(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.misses)

    @property
    def lesion_wise_dice(self) -> float | None:
        """Mean Dice of all lesions and false pieces, the latter and what was missed counting as 0.

        As in BraTS since 2023 (Moawad et al. 2023, arXiv:2306.00838), which matches and grows lesions otherwise.
        """
        return _share(sum(lesion.dice for lesion in self.lesions), len(self.lesions) + self.false_positives)


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def detect(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float] | None = None, overlap: float = OVERLAP
) -> Detection:
    """Find out which lesions a prediction has found.

    Args:
        prediction: (H, W) or (D, H, W), nonzero inside.
        truth: As large, nonzero inside.
        spacing: Distance of (slices,) rows and columns, in mm: sizes are mm² or mm³; None counts pixels or voxels.
        overlap: Smallest IoU of a lesion with what has found it. From 0.5 on no piece can have two lesions to choose
            from; 0 asks for one common voxel.

    Raises:
        ValueError: The shapes differ, the spacing has another number of axes, or the overlap is not in [0, 1].
    """
    scale = (1.0,) * truth.ndim if spacing is None else tuple(map(float, spacing))
    if prediction.shape != truth.shape or truth.ndim != len(scale) or truth.ndim not in (2, 3):
        raise ValueError(
            f"expected two masks of one size and its spacing, got {prediction.shape}, {truth.shape}, {scale}"
        )
    if not 0 <= overlap <= 1:
        raise ValueError(f"expected an overlap between 0 and 1, got {overlap}")
    box = extent((prediction != 0) | (truth != 0))
    if box is None:
        return Detection((), ())
    predicted, true = _pieces(prediction[box]), _pieces(truth[box])
    sizes, true_sizes = (np.bincount(labels.ravel())[1:] for labels in (predicted, true))
    piece, lesion, common = _in_common(predicted, true)
    iou = common / (sizes[piece] + true_sizes[lesion] - common)
    kept = iou >= overlap
    piece, lesion, common, iou = piece[kept], lesion[kept], common[kept], iou[kept]
    partners = {int(lesion[pair]): int(pair) for pair in _matched(piece, lesion, iou)}
    unit = float(np.prod(scale))
    found = []
    for number, size in enumerate(true_sizes.tolist()):
        pair = partners.get(number)
        if pair is None:
            found.append(Lesion(size * unit, False, 0.0, 0.0))
        else:
            dice = 2 * int(common[pair]) / (int(sizes[piece[pair]]) + size)
            found.append(Lesion(size * unit, True, dice, float(iou[pair])))
    taken = {int(piece[pair]) for pair in partners.values()}
    false = tuple(size * unit for number, size in enumerate(sizes.tolist()) if number not in taken)
    return Detection(tuple(found), false)


def pool(detections: Iterable[Detection]) -> Detection:
    """All lesions of several cases, so that each lesion counts alike."""
    cases = tuple(detections)
    return Detection(
        tuple(lesion for case in cases for lesion in case.lesions),
        tuple(size for case in cases for size in case.false_sizes),
    )


def _pieces(mask: np.ndarray) -> np.ndarray:
    """Number of the connected piece at each place, from 1; 0 outside. Corners connect."""
    from scipy.ndimage import generate_binary_structure, label

    return label(mask != 0, generate_binary_structure(mask.ndim, mask.ndim))[0]


def _in_common(predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs that share places: predicted piece and true one, from 0, and how many places."""
    both = (predicted != 0) & (true != 0)
    step = int(true.max(initial=0)) + 1
    pairs, common = np.unique(predicted[both].astype(np.int64) * step + true[both], return_counts=True)
    return pairs // step - 1, pairs % step - 1, common


def _matched(piece: np.ndarray, lesion: np.ndarray, iou: np.ndarray) -> list[int]:
    """Which pairs are matched, one to one, for the largest sum of IoU.

    Pairs that compete, directly or through others, are looked at together: mostly it is one.
    """
    if not piece.size:
        return []
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    nodes = int(piece.max()) + 1 + int(lesion.max()) + 1
    ends = piece, lesion + int(piece.max()) + 1
    groups = connected_components(coo_matrix((np.ones(len(piece)), ends), (nodes, nodes)), directed=False)[1][piece]
    order = np.argsort(groups, kind="stable")
    chosen = []
    for pairs in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        rows, row = np.unique(piece[pairs], return_inverse=True)
        columns, column = np.unique(lesion[pairs], return_inverse=True)
        gain = np.zeros((len(rows), len(columns)))
        gain[row, column] = iou[pairs]
        at = {(r, c): int(pair) for r, c, pair in zip(row.tolist(), column.tolist(), pairs.tolist(), strict=True)}
        best = zip(*(side.tolist() for side in linear_sum_assignment(gain, maximize=True)), strict=True)
        chosen += [at[place] for place in best if place in at]
    return chosen
