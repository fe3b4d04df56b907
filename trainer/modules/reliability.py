"""Whether probabilities of pixels can be believed: reliability by bins, calibration error and Brier score.

Shapes: H W native height and width of an image, K `BINS`.
Sources: Brier 1950; Guo et al. 2017 (arXiv:1706.04599), reliability diagrams and the expected calibration error.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

BINS = 15
"""Equally wide bins of probability, as in Guo et al."""
AROUND = 0.1
"""How far the region that is looked at reaches beyond a target's box, in parts of the box's sides on each of them."""
LEAST = 8
"""Pixels that it reaches beyond the box at least: in a tenth of a small lesion's side there would be no edge."""


def region_of(truth: Tensor) -> tuple[slice, slice]:
    """Rows and columns of a target's own box enlarged by `AROUND`; the whole image for an empty target.

    Beyond it a pixel is background so surely that, taken in, millions of them would make every model look calibrated;
    and it does not depend on the prompt, so that evaluations can be compared.

    Args:
        truth: (H, W), nonzero inside.
    """
    rows, columns = truth.any(1).nonzero()[:, 0], truth.any(0).nonzero()[:, 0]
    if not len(rows):
        return slice(None), slice(None)
    parts = []
    for found in (rows, columns):
        first, last = int(found[0]), int(found[-1])
        reach = max(LEAST, round(AROUND * (last + 1 - first)))
        parts.append(slice(max(0, first - reach), last + 1 + reach))
    return parts[0], parts[1]


def reliability(logits: Tensor, truth: Tensor, whole: bool = False) -> np.ndarray:
    """Predicted probability against truth in each bin.

    Args:
        logits: (H, W) of any floating type; what is no number is taken for 0 probability, as in a mask.
        truth: (H, W), nonzero inside, on any device.
        whole: Look at the whole image, not at `region_of` alone.

    Returns:
        (4, K) float64: share of the pixels in each bin, and of all pixels the mean of the probability, of the truth and
        of their squared difference that a bin adds. So the first row adds up to 1, the last to the Brier score.
    """
    part = (slice(None), slice(None)) if whole else region_of(truth)
    probability = logits[part].float().sigmoid().nan_to_num(nan=0.0).flatten().cpu().numpy().astype(np.float64)
    true = (truth[part] != 0).flatten().cpu().numpy().astype(np.float64)
    return in_bins(probability, true) / len(true)


def in_bins(promised: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Values (N,) between 0 and 1 in bins of what was promised.

    Args:
        promised: What was promised.
        found: What came true.

    Returns:
        (4, K) number, sums of both, and sum of their squared differences.
    """
    place = np.minimum((promised * BINS).astype(np.intp), BINS - 1)  # in float64: numpy and torch agree at the edges
    apart = promised - found
    sums = (np.bincount(place, weight, BINS) for weight in (promised, found, apart * apart))
    return np.stack([np.bincount(place, minlength=BINS), *sums]).astype(np.float64)


def calibration_error(shares: np.ndarray) -> float:
    """Expected calibration error of what `reliability` returns, or of the mean of several: ``Σ nᵇ/n |pᵇ − tᵇ|``."""
    return float(np.abs(shares[1] - shares[2]).sum() / max(shares[0].sum(), 1e-12))
