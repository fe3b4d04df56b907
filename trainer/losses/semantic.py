"""Losses on the semantic mask: all of a concept in one mask.

Shapes: P prompts, h w the mask head's side, H W that of the targets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.losses.instance_masks import Side, dice_loss, focal_loss, on_one_side
from trainer.losses.sets import ObjectSets

ALPHA, GAMMA = 0.6, 2.0  # of the focal loss on semantic masks, as in SAM3


def semantic_truth(targets: ObjectSets) -> Tensor | None:
    """All of each concept in one mask (P, H, W): as given, else the union of its instances; None with no masks."""
    if targets.semantic is not None or targets.masks is None:
        return targets.semantic
    nothing = targets.masks.new_zeros(targets.masks.shape[1:])
    parts = targets.masks.split(list(targets.counts))
    return torch.stack([part.amax(0) if len(part) else nothing for part in parts]) if parts else targets.masks[:0]


def semantic_losses(
    logits: Tensor,
    truth: Tensor,
    *,
    at: Side = "head",
    focal: bool = True,
    present_only: bool = True,
    presence: Tensor | None = None,
    shown: Tensor | None = None,
) -> dict[str, Tensor]:
    """Losses of SAM3's `SemanticSegCriterion`; what no official recipe uses of it is here to be tested against it.

    Args:
        logits: (P, h, w).
        truth: (P, H, W) of 0 and 1.
        at: Where the two meet, as in `on_one_side`.
        focal: Take the focal loss; otherwise plain binary cross-entropy.
        present_only: Take means over the prompts whose concept is there; otherwise over all.
        presence: (P,) logits of a segmentation head that says itself whether the concept is there.
        shown: What sums over the prompts whose concept is there are divided by; their number if null.

    Returns:
        ``semantic_loss`` (focal), ``semantic_dice`` and with `presence` also ``semantic_presence``, means over prompts.
    """
    present = truth.flatten(1).any(1).float()
    values, shares = on_one_side(logits, truth, at)
    if focal:
        pixels = focal_loss(values, shares, ALPHA, GAMMA)
    else:
        pixels = F.binary_cross_entropy_with_logits(values, shares, reduction="none")
    losses = torch.stack([pixels.mean(1), dice_loss(values, shares)])
    shown = present.sum() + 1e-6 if shown is None else shown
    losses = (losses * present).sum(1) / shown if present_only else losses.mean(1)
    found = {"semantic_loss": losses[0], "semantic_dice": losses[1]}
    if presence is not None:
        found["semantic_presence"] = F.binary_cross_entropy_with_logits(presence.float(), present)
    return found
