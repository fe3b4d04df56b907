"""Losses on masks.

Shapes: Q masks, h w height and width of the logits, H W those of the targets.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_shards.errors import UserError

HELD = 2**22
"""Pixels of enlarged logits that are computed and held at once: 16 MiB in fp32, four masks of 1024 px."""


class DiceCrossEntropy(nn.Module):
    """Sum of Dice loss and binary cross-entropy, unweighted as in MedSAM (Ma et al. 2024, Methods, "Loss function").

    Dice is ``1 - (2 Σ g s + ε) / (Σ g² + Σ s² + ε)``, MONAI's ``DiceLoss(sigmoid=True, squared_pred=True)``, one
    value a mask; cross-entropy is the mean over the mask's pixels. Computed in fp32 whatever the logits' dtype. Of many
    masks only a few are enlarged at a time, and again in the backward pass: see `by_mask`.

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
            logits: (Q, h, w) mask logits. Of another size than the targets they are enlarged, bilinear as in SAM.
            targets: (Q, H, W) truth, 0 or 1.

        Returns:
            Per mask, (Q,) each: ``loss`` (the weighted sum), ``dice_loss``, ``cross_entropy``.
        """
        dice_loss, cross_entropy = by_mask(self._parts, logits, targets).unbind()
        loss = self.dice_weight * dice_loss + self.cross_entropy_weight * cross_entropy
        return {"loss": loss, "dice_loss": dice_loss, "cross_entropy": cross_entropy}

    def _parts(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Dice loss and cross-entropy, (2, Q), of logits (Q, H, W)."""
        logits, targets = logits.float().flatten(1), targets.float().flatten(1)
        probabilities = logits.sigmoid()
        overlap = (probabilities * targets).sum(1)
        total = probabilities.square().sum(1) + targets.square().sum(1)
        dice_loss = 1 - (2 * overlap + self.smooth) / (total + self.smooth)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
        return torch.stack([dice_loss, cross_entropy])


def by_mask(compute: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    """What is computed of each mask at the size of its target, in memory that does not grow with their number.

    Up to `HELD` pixels it is computed in one go, and what the backward pass needs is held; of more, so many at a time,
    and in the backward pass again: then nothing of full size is held but the targets.

    Args:
        compute: Takes logits and targets (N, H, W) of some masks, and gives (K, N).
        logits: (Q, h, w), enlarged bilinear where they are smaller than the targets.
        targets: (Q, H, W).

    Returns:
        (K, Q).
    """
    size = (targets.shape[-2], targets.shape[-1])

    def at_full_size(some: Tensor, theirs: Tensor) -> Tensor:
        return compute(resize_logits(some, size), theirs)

    if targets.numel() <= HELD:
        return at_full_size(logits, targets)
    count = max(1, HELD // (size[0] * size[1]))
    pairs = zip(logits.split(count), targets.split(count), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([at_full_size(*pair) for pair in pairs], dim=1)
    again = [checkpoint(at_full_size, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    return torch.cat(again, dim=1)


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring logits (Q, h, w) to (Q, *size), bilinear as in SAM; nothing is done where they fit already."""
    if logits.shape[-2:] == torch.Size(size):
        return logits
    return F.interpolate(logits[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
