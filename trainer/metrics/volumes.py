"""Scores of one object in a volume.

Shapes: D H W slices, height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.metrics.surface import extent, measure, robust_hausdorff, share_within


@dataclass(frozen=True)
class VolumeScores:
    """How well a prediction of one object in a volume fits the truth.

    Attributes:
        dsc: Dice similarity coefficient over all voxels; 1 where both are empty.
        nsd: Normalised surface Dice of the surfaces in 3D; 1 where both are empty, 0 where one is.
        hd95: Distance within which 95 % of each surface lies of the other one, in mm where the spacing is known, else
            in voxels; infinite where one of the two is empty.
        tolerance: Largest distance that `nsd` forgives: ``2 mm`` where the spacing is known, ``2 px`` otherwise.
    """

    dsc: float
    nsd: float
    hd95: float
    tolerance: str


def volume_scores(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: tuple[float, float, float] | None = None,
    tolerance: float = 2.0,
) -> VolumeScores:
    """Score a prediction of one object in a volume.

    Args:
        prediction: (D, H, W), nonzero inside; bool is fastest.
        truth: As large, nonzero inside.
        spacing: Millimetres between slices, rows and columns; None where they are not known: distances are in voxels.
        tolerance: Largest distance that surface Dice forgives, in mm, or in voxels without a spacing.

    Raises:
        ValueError: The shapes differ, or are not those of a volume.
    """
    if prediction.shape != truth.shape or truth.ndim != 3:
        raise ValueError(f"expected two volumes of one size, got {prediction.shape} and {truth.shape}")
    predicted, true = (mask if mask.dtype == np.bool_ else mask != 0 for mask in (prediction, truth))
    scale = (1.0, 1.0, 1.0) if spacing is None else spacing
    measured = measure(predicted, true, scale)
    return VolumeScores(
        dsc=dice(predicted, true),
        nsd=share_within(measured, tolerance),
        hd95=robust_hausdorff(measured),
        tolerance=f"{tolerance:g} {'px' if spacing is None else 'mm'}",
    )


def slice_dsc(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Dice similarity coefficient of each slice, 1 where both are empty there: (D,) float64.

    Args:
        prediction: (D, H, W), nonzero inside.
        truth: As large, nonzero inside.
    """
    return np.array([dice(one != 0, other != 0) for one, other in zip(prediction, truth, strict=True)], np.float64)


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Dice similarity coefficient of masks of any dimension, bool; 1 where both are empty."""
    sizes = int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth))
    box = extent(truth)
    if not sizes or box is None:
        return 0.0 if sizes else 1.0
    return 2 * int(np.count_nonzero(prediction[box] & truth[box])) / sizes


def iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of masks of any dimension, bool; 1 where both are empty."""
    share = dice(prediction, truth)
    return share / (2 - share)
