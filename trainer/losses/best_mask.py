"""SAM2's training loss: on the best of several masks, on their predicted IoU, and on whether the object is there.

Shapes: Q objects, M masks of each, h w the decoder's mask side, H W that of the targets.
"""

from __future__ import annotations

from functools import partial
from math import inf

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_shards.errors import UserError
from trainer.losses.instance_masks import dice_loss, focal_loss
from trainer.losses.masks import HELD, by_mask, resize_logits


class BestMaskLoss(nn.Module):
    """Focal, Dice, IoU and presence losses, as SAM2 is trained with.

    Of several masks of an object only the one with the smallest weighted sum of focal and Dice loss learns. An object
    that is not there teaches nothing but its presence. The defaults are those of the released training configuration of
    SAM 2.1, and values and gradients those of its `MultiStepMultiMasksAndIous`. Computed in fp32 whatever the logits'
    dtype; the device is never waited for. No full-size intermediate outlives the call: the best mask is computed again
    in the backward pass; of many objects a few are enlarged at a time.

    Source: Ravi et al. 2024 (arXiv:2408.00714), appendix, "Losses and optimization".

    Args:
        focal_weight: Factor on the focal loss, the mean over a mask's pixels.
        dice_weight: Factor on the Dice loss, ``1 - (2 Σ g s + 1) / (Σ g + Σ s + 1)``.
        iou_weight: Factor on the error of the predicted IoU.
        presence_weight: Factor on the loss of the object score.
        focal_alpha: Share of the object's pixels in the focal loss, in [0, 1].
        focal_gamma: Exponent of the focal loss.
        iou_l1: Take the absolute error of the predicted IoU; its square otherwise, as in SAM.
        all_ious: Teach the predicted IoU of all masks of an object, on average; that of the best one alone otherwise.
        presence_alpha: Share of the objects that are there in a focal loss on the object score; null weighs them alike.
        presence_gamma: Exponent of that focal loss; 0, with no share, is plain cross-entropy.
    """

    def __init__(
        self,
        focal_weight: float = 20.0,
        dice_weight: float = 1.0,
        iou_weight: float = 1.0,
        presence_weight: float = 1.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        iou_l1: bool = True,
        all_ious: bool = True,
        presence_alpha: float | None = None,
        presence_gamma: float = 0.0,
    ) -> None:
        super().__init__()
        weights = (focal_weight, dice_weight, iou_weight, presence_weight)
        if not all(0 <= weight < inf for weight in weights) or not focal_weight + dice_weight:
            raise UserError(
                "BestMaskLoss: focal_weight, dice_weight, iou_weight and presence_weight are 0 or more, the first two "
                f"not both 0, not {', '.join(map(str, weights))}"
            )
        alphas = (focal_alpha, 0.5 if presence_alpha is None else presence_alpha)
        if not all(0 <= alpha <= 1 for alpha in alphas) or not all(0 <= g < inf for g in (focal_gamma, presence_gamma)):
            raise UserError(
                "BestMaskLoss: focal_alpha and presence_alpha are in [0, 1] (presence_alpha may be null), focal_gamma "
                f"and presence_gamma 0 or more, not {focal_alpha}, {presence_alpha}, {focal_gamma}, {presence_gamma}"
            )
        self.focal_weight, self.dice_weight = focal_weight, dice_weight
        self.iou_weight, self.presence_weight = iou_weight, presence_weight
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.presence_alpha, self.presence_gamma = presence_alpha, presence_gamma
        self.iou_l1, self.all_ious = iou_l1, all_ious

    def forward(self, logits: Tensor, ious: Tensor, presence: Tensor | None, targets: Tensor) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            logits: (Q, M, h, w) mask logits. Of another size than the targets they are enlarged, bilinear as in SAM2,
                one mask of each object at a time.
            ious: (Q, M) predicted IoUs.
            presence: (Q,) logits of the object score; None for a model without one: then an empty target teaches its
                masks to be empty, as in the official code.
            targets: (Q, H, W) truth, 0 or 1; a pixel above 0 counts as the object's in IoU and presence.

        Returns:
            Per object, (Q,) each: ``loss`` (the weighted sum), ``focal``, ``dice_loss``, ``iou_loss``,
            ``presence_loss``.
        """
        targets = targets.float()
        best, overlaps = self._best(logits, targets)
        rows = torch.arange(len(best), device=best.device)
        focal, dice = self._mask_losses(logits[rows, best], targets)
        errors = ious.float() - overlaps
        errors = errors.abs() if self.iou_l1 else errors.square()
        iou_loss = errors.mean(1) if self.all_ious else errors[rows, best]
        presence_loss = torch.zeros_like(iou_loss)
        if presence is not None:
            there = (targets > 0).flatten(1).any(1).float()
            focal, dice, iou_loss = focal * there, dice * there, iou_loss * there
            presence_loss = self._presence_loss(presence.float(), there)
        loss = self.focal_weight * focal + self.dice_weight * dice
        loss = loss + self.iou_weight * iou_loss + self.presence_weight * presence_loss
        parts = {"focal": focal, "dice_loss": dice, "iou_loss": iou_loss, "presence_loss": presence_loss}
        return {"loss": loss, **parts}

    @torch.no_grad()
    def _best(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Which mask of each object is the best, (Q,), and the IoU of each mask with its target, (Q, M)."""
        compare = partial(self._compared, alone=logits.shape[1] == 1)
        ious, costs = torch.stack([by_mask(compare, masks, targets) for masks in logits.unbind(1)], 2)
        return costs.argmin(1), ious

    def _compared(self, logits: Tensor, targets: Tensor, alone: bool) -> Tensor:
        """IoU of masks (Q, H, W) with their targets, and what they cost, (2, Q); one alone is the best, at any cost."""
        found, there = logits > 0, targets > 0
        shared, either = (pixels.flatten(1).sum(1) for pixels in (found & there, found | there))
        iou = shared / either.clamp(min=1)
        if alone:
            return torch.stack([iou, torch.zeros_like(iou)])
        focal, dice = self._full_size_losses(logits, targets)
        return torch.stack([iou, self.focal_weight * focal + self.dice_weight * dice])

    def _mask_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Focal and Dice loss (Q,) of one mask of each object (Q, h, w); only logits and targets are held for later."""
        if torch.is_grad_enabled() and targets.numel() <= HELD:
            losses = checkpoint(self._full_size_losses, logits, targets, use_reentrant=False, preserve_rng_state=False)
        else:
            losses = by_mask(self._full_size_losses, logits, targets)
        return losses[0], losses[1]

    def _full_size_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Focal and Dice loss, (2, Q)."""
        values = resize_logits(logits, (targets.shape[-2], targets.shape[-1])).float().flatten(1)
        truth = targets.flatten(1)
        focal = focal_loss(values, truth, self.focal_alpha, self.focal_gamma).mean(1)
        return torch.stack([focal, dice_loss(values, truth)])

    def _presence_loss(self, presence: Tensor, there: Tensor) -> Tensor:
        """Loss (Q,) of the object scores."""
        if self.presence_alpha is None:  # both sides weigh one half, which is taken out again
            return 2 * focal_loss(presence, there, 0.5, self.presence_gamma)
        return focal_loss(presence, there, self.presence_alpha, self.presence_gamma)
