"""How fast is the normalised surface Dice (NSD) of a pair of masks, and does it equal the definition's?

python benchmarks/metrics.py           # under a minute on two cores
python benchmarks/metrics.py --quick   # masks of 256 × 256

Ours, Google's `surface-distance`, whose definition it is, and MONAI's in its subvoxel mode, on the same pairs of masks
of 1024 × 1024 in turns: contours of brain and white matter, and the same ones shifted and eroded. Spacing 0.5 mm,
tolerance 2.2 mm. HD95 of ours comes from the same outlines.

The last line is one JSON object:
  benchmark     "metrics"
  quick         whether --quick was given
  side          of the masks, in pixels
  pairs         number of pairs
  milliseconds  {"ours", "surface_distance", "monai"}: of a pair's NSD, medians over rounds that run all in turn
  difference    {"surface_distance", "monai"}: largest difference of NSD from ours
  ratio         `surface_distance` divided by `ours`
  bar           {"least", "met"}: the ratio that is asked for, at full size
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from measuring import arguments, finish, medians
from monai.metrics import compute_surface_dice
from samples import slices
from scipy.ndimage import binary_erosion
from surface_distance import compute_surface_dice_at_tolerance, compute_surface_distances

from trainer.metrics import nsd

SPACING, TOLERANCE, BAR = (0.5, 0.5), 2.2, 5.0
Pair = tuple[np.ndarray, np.ndarray]


def pairs(count: int, side: int) -> list[Pair]:
    """Predictions and truths (side, side) of bool."""
    found = []
    for number, source in enumerate(slices(count)):
        for term in ("brain", "cerebral white matter"):
            mask = source.masks[term]
            if side < len(mask):
                mask = mask[:: len(mask) // side, :: len(mask) // side]
            truth = mask.repeat(side // len(mask), axis=0).repeat(side // len(mask), axis=1)
            found.append((np.roll(binary_erosion(truth, iterations=number % 3 + 1), (3, -2), (0, 1)), truth))
    return found


def google(prediction: np.ndarray, truth: np.ndarray) -> float:
    """NSD by its own definition's code."""
    found = compute_surface_distances(truth, prediction, SPACING)
    return float(compute_surface_dice_at_tolerance(found, TOLERANCE))


def monai(prediction: np.ndarray, truth: np.ndarray) -> float:
    """NSD by MONAI."""
    both = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth))
    options = {"include_background": True, "spacing": SPACING, "use_subvoxels": True}
    return float(compute_surface_dice(*both, class_thresholds=[TOLERANCE], **options))


WAYS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "ours": lambda prediction, truth: nsd(prediction, truth, TOLERANCE, SPACING),
    "surface_distance": google,
    "monai": monai,
}


def main() -> None:
    values = arguments(__doc__, pairs=0, rounds=0)
    side = 256 if values.quick else 1024
    masks = pairs(values.pairs or 3, side)
    answers = {name: np.array([way(*pair) for pair in masks]) for name, way in WAYS.items()}
    difference = {name: float(np.abs(answers[name] - answers["ours"]).max()) for name in list(WAYS)[1:]}

    def over(way: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[], int]:
        return lambda: len([way(*pair) for pair in masks])

    rates = medians({name: over(way) for name, way in WAYS.items()}, values.rounds or 5)
    milliseconds = {name: 1000 / rate for name, rate in rates.items()}
    ratio = milliseconds["surface_distance"] / milliseconds["ours"]
    for name, figure in milliseconds.items():
        off = f", differs by {difference[name]:.1e}" if name in difference else ""
        print(f"{name}: {figure:.2f} ms a pair of {side} × {side}{off}")
    print(f"{ratio:.1f} times as fast as the definition's own code")
    finish(
        {
            "benchmark": "metrics",
            "quick": values.quick,
            "side": side,
            "pairs": len(masks),
            "milliseconds": milliseconds,
            "difference": difference,
            "ratio": ratio,
            "bar": {"least": BAR, "met": ratio >= BAR},
        },
        values.save,
    )


if __name__ == "__main__":
    main()
