"""Overlap of masks.

Shapes: Q masks, H W height and width.
"""

from __future__ import annotations

from torch import Tensor


def overlap(predictions: Tensor, truths: Tensor) -> tuple[Tensor, Tensor]:
    """Dice similarity coefficient and intersection over union of binary masks.

    DSC = 2|P∩T| / (|P| + |T|), IoU = |P∩T| / |P∪T|; both are 1 where prediction and truth are empty.

    Args:
        predictions: (Q, H, W), nonzero inside.
        truths: (Q, H, W), nonzero inside.

    Returns:
        DSC (Q,) and IoU (Q,), float32.
    """
    predicted, true = (predictions != 0).flatten(1), (truths != 0).flatten(1)
    both = (predicted & true).sum(1).float()
    sizes = (predicted.sum(1) + true.sum(1)).float()
    empty = sizes == 0
    dsc = (2 * both / sizes.clamp(min=1)).masked_fill(empty, 1.0)
    iou = (both / (sizes - both).clamp(min=1)).masked_fill(empty, 1.0)
    return dsc, iou
