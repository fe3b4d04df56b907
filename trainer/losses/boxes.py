"""How boxes overlap. Boxes are (cx, cy, w, h); any leading dimensions, which broadcast."""

from __future__ import annotations

import torch
from torch import Tensor


def overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of boxes (..., 4) with others (..., 4), and its generalised form.

    The latter is Rezatofighi et al. 2019, Algorithm 1. Nothing over nothing counts as 0, so that values and gradients
    of boxes without an area are finite.

    Returns:
        IoU in [0, 1] and generalised IoU in [-1, 1], (...) each.
    """
    left, top, right, bottom = corners(boxes)
    others_left, others_top, others_right, others_bottom = corners(others)
    width = torch.minimum(right, others_right) - torch.maximum(left, others_left)
    height = torch.minimum(bottom, others_bottom) - torch.maximum(top, others_top)
    shared = width.clamp(min=0) * height.clamp(min=0)
    width = torch.maximum(right, others_right) - torch.minimum(left, others_left)
    height = torch.maximum(bottom, others_bottom) - torch.minimum(top, others_top)
    around = width.clamp(min=0) * height.clamp(min=0)
    area, others_area = (right - left) * (bottom - top), (others_right - others_left) * (others_bottom - others_top)
    union = area + others_area - shared
    iou = _ratio(shared, union)
    return iou, iou - _ratio(around - union, around)


def corners(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left, top, right and bottom, (...) each: coordinates apart are faster than a last dimension of 2."""
    x, y, width, height = boxes.unbind(-1)
    return x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Divide, and give 0 where the whole is nothing; there neither has a gradient."""
    filled = whole != 0
    return torch.where(filled, part, 0) / torch.where(filled, whole, 1)
