"""Points of regions: drawn at random on the device, or the innermost one.

Shapes: Q targets, P points a target, S the model's input side.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from trainer.prompts.base import Truth

DRAWN_BELOW = 2**62
"""Numbers that `drawn` takes are smaller: so large that their remainders are even to one part in 10¹²."""


def on_target(truth: Truth) -> Tensor:
    """Pixels of each target: (Q, S, S) bool."""
    return (truth.masks > 0.5) & inside(truth)


def inside(truth: Truth, side: int | None = None) -> Tensor:
    """Pixels of each target's image, without the padding: (Q, S, S) bool, or on a grid of another `side`."""
    sizes, whole = truth.sizes.to(truth.masks.device, non_blocking=True), truth.masks.shape[-1]
    ticks = torch.arange(side or whole, device=sizes.device) * (whole / (side or whole))
    rows, columns = ticks < sizes[:, :1], ticks < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def near(truth: Truth) -> Tensor:
    """Pixels of each target's box, enlarged on every side by half of its longer one: (Q, S, S) bool."""
    boxes = truth.boxes.to(truth.masks.device, non_blocking=True)
    margin = ((boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) / 2).clamp(min=1)
    ticks = torch.arange(truth.masks.shape[-1], device=boxes.device)
    low, high = (boxes[:, :2] - margin)[..., None], (boxes[:, 2:] + margin)[..., None]
    columns, rows = ((ticks >= low) & (ticks <= high)).unbind(1)
    return rows[:, :, None] & columns[:, None, :]


def any_pixel(regions: Tensor) -> Tensor:
    """Which of the regions (Q, S, S) have a pixel at all: (Q,) bool."""
    return regions.flatten(1).any(1)


def first_with_pixels(regions: Tensor, others: Tensor) -> Tensor:
    """Each region (Q, S, S) where it has a pixel, and the other one where it has none."""
    return torch.where(any_pixel(regions)[:, None, None], regions, others)


def drawn(regions: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Points drawn uniformly from regions, with replacement; the device is never waited for.

    Args:
        regions: (Q, S, S) bool.
        numbers: (Q, P) int64, uniform from 0 to `DRAWN_BELOW`, on the CPU.

    Returns:
        Points (Q, P, 2) float32 as (x, y), and which of the regions have a pixel at all, (Q,) bool.
    """
    in_rows = regions.sum(2, dtype=torch.int32)  # on a CPU twice as fast as with 64 bits
    until = in_rows.cumsum(1)  # 64 bits
    count = until[:, -1:]
    rank = numbers.to(regions.device, non_blocking=True) % count.clamp(min=1)
    last = regions.shape[1] - 1
    y = torch.searchsorted(until, rank, right=True).clamp(max=last)
    left = rank - (until - in_rows).gather(1, y)
    lines = regions[torch.arange(len(regions), device=y.device)[:, None], y]
    x = torch.searchsorted(lines.cumsum(2), left[..., None], right=True)[..., 0].clamp(max=last)
    return torch.stack([x, y], dim=2).float(), count[:, 0] > 0


def innermost(regions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The pixels of regions that are farthest from their border; each counts as border for the next.

    Args:
        regions: (Q, S, S) bool.
        count: Number P of points. In a region of fewer pixels the first is repeated.

    Returns:
        As `drawn` does.
    """
    found = torch.zeros(len(regions), count, 2)
    there = torch.zeros(len(regions), dtype=torch.bool)
    for q, region in enumerate(regions.cpu().numpy().copy()):
        for p in range(count):
            depth, x, y = deepest(region)
            there[q] |= depth > 0
            found[q, p] = torch.tensor([x, y]) if depth > 0 else found[q, 0]
            region[y, x] = False
    return found.to(regions.device), there.to(regions.device)


def deepest(region: np.ndarray) -> tuple[float, int, int]:
    """Find the pixel of a region that is farthest from its border.

    Args:
        region: (S, S) bool; the image's border is a border of the region too.

    Returns:
        Distance in pixels to the next pixel outside, 0 if there is no pixel inside; x; y. Of several, the first by
        rows.
    """
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    if not len(rows):
        return 0.0, 0, 0
    top, left = int(rows[0]), int(columns[0])
    depth = distance_transform_edt(np.pad(region[top : rows[-1] + 1, left : columns[-1] + 1], 1))
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return float(depth[y, x]), left + int(x) - 1, top + int(y) - 1
