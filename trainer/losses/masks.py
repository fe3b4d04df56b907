"""Losses on masks.

Shapes: Q masks, H W height and width.
"""

from __future__ import annotations

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards.errors import UserError


class DiceCrossEntropy(nn.Module):
    """Sum of Dice loss and binary cross-entropy, unweighted as in MedSAM (Ma et al. 2024, Methods, "Loss function").

    Dice is ``1 - (2 Σ g s + ε) / (Σ g² + Σ s² + ε)``, MONAI's ``DiceLoss(sigmoid=True, squared_pred=True)``, one
    value a mask; cross-entropy is the mean over the mask's pixels. Computed in fp32 whatever the logits' dtype.

    Args:
        dice_weight: Factor on the Dice part.
        cross_entropy_weight: Factor on the cross-entropy part.
        smooth: ε above; MONAI's default is 1e-5.
    """

    def __init__(self, dice_weight: float = 1.0, cross_entropy_weight: float = 1.0, smooth: float = 1e-5) -> None:
        super().__init__()
        weights = (dice_weight, cross_entropy_weight)
        if not all(0 <= weight < inf for weight in weights) or not sum(weights) or not 0 < smooth < inf:
            raise UserError(
                "DiceCrossEntropy: dice_weight and cross_entropy_weight are 0 or more and not both 0, smooth is above "
                f"0, not {dice_weight}, {cross_entropy_weight} and {smooth}"
            )
        self.dice_weight, self.cross_entropy_weight, self.smooth = dice_weight, cross_entropy_weight, smooth

    def forward(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            logits: (Q, H, W) mask logits.
            targets: (Q, H, W) truth, 0 or 1.

        Returns:
            Per mask, (Q,) each: ``loss`` (the weighted sum), ``dice_loss``, ``cross_entropy``.
        """
        logits, targets = logits.float().flatten(1), targets.float().flatten(1)
        probabilities = logits.sigmoid()
        overlap = (probabilities * targets).sum(1)
        total = probabilities.square().sum(1) + targets.square().sum(1)
        dice_loss = 1 - (2 * overlap + self.smooth) / (total + self.smooth)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
        loss = self.dice_weight * dice_loss + self.cross_entropy_weight * cross_entropy
        return {"loss": loss, "dice_loss": dice_loss, "cross_entropy": cross_entropy}


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring logits (Q, h, w) to (Q, *size), bilinear as in SAM; nothing is done where they fit already."""
    if logits.shape[-2:] == torch.Size(size):
        return logits
    return F.interpolate(logits[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
