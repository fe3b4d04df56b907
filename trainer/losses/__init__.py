"""Losses: masks now, set prediction with SAM3."""

from trainer.losses.masks import DiceCrossEntropy, resize_logits

__all__ = ["DiceCrossEntropy", "resize_logits"]
