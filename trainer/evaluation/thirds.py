"""Objects by their size: terciles within each unit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.evaluation.told import amount

UNITS = {"ml": "mL", "voxels": "voxels", "mm2": "mm²", "px": "px"}
"""Units as tables have them, and as they are written."""


def thirds(sizes: Sequence[tuple[float | None, str]]) -> dict[str, list[int]]:
    """Small, medium and large objects: terciles of their size, within each unit.

    Args:
        sizes: Size and unit, a key of `UNITS`, of each object; None where it is not known.

    Returns:
        Groups in rising order, each with the positions of its objects. Objects of one size are never torn apart, so
        that a group may be larger than a third, or lacking.
    """
    found: dict[str, list[int]] = {}
    for unit, written in UNITS.items():
        places = [place for place, (size, mine) in enumerate(sizes) if mine == unit and size is not None]
        if not places:
            continue
        values = np.array([sizes[place][0] for place in places], np.float64)
        low, high = np.quantile(values, [1 / 3, 2 / 3])
        middle = f"{amount(low)} to {amount(high)} {written}"
        names = (f"small: up to {amount(low)} {written}", f"medium: {middle}", f"large: above {amount(high)} {written}")
        inside = (values <= low, (values > low) & (values <= high), values > high)
        for name, chosen in zip(names, inside, strict=True):
            if chosen.any():
                found[name] = [place for place, is_in in zip(places, chosen.tolist(), strict=True) if is_in]
    return found
