"""Hand-made targets that prompts are simulated from.

Shapes: Q targets, S side of the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.prompts import Truth


def blank(side: int = 32) -> Tensor:
    """An empty mask (S, S)."""
    return torch.zeros(side, side)


def rectangle(x0: int, y0: int, x1: int, y1: int, side: int = 32) -> Tensor:
    """A filled rectangle (S, S); its last row and column belong to it."""
    mask = blank(side)
    mask[y0 : y1 + 1, x0 : x1 + 1] = 1
    return mask


def cross(side: int = 32) -> Tensor:
    """A plus sign of 32 pixels around (12, 15), arms 2 pixels wide, in (S, S)."""
    return (rectangle(8, 14, 17, 15, side) + rectangle(11, 12, 12, 19, side)).clamp(max=1)


def tight(mask: Tensor) -> list[float]:
    """The box (x0, y0, x1, y1) of a mask, 0 where it is empty."""
    y, x = mask.nonzero(as_tuple=True)
    return [float(v) for v in (x.min(), y.min(), x.max(), y.max())] if len(x) else [0.0] * 4


def truth_of(
    masks: Sequence[Tensor],
    draws: Sequence[tuple[int, ...]] | None = None,
    size: tuple[int, int] | None = None,
    mask_side: int | None = None,
) -> Truth:
    """The truth of some masks (S, S), one image each, valid up to `size` (height, width)."""
    side = masks[0].shape[-1] if masks else 32
    boxes = torch.tensor([tight(mask) for mask in masks]).reshape(-1, 4)
    return Truth(
        image_index=torch.arange(len(masks)),
        boxes=boxes,
        sizes=torch.tensor([size or (side, side)] * len(masks), dtype=torch.float32).reshape(-1, 2),
        masks=torch.stack(list(masks)) if masks else torch.zeros(0, side, side),
        draws=list(draws) if draws is not None else [(q, 0) for q in range(len(masks))],
        mask_side=mask_side or side,
    )
