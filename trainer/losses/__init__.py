"""Losses: on masks, on the best of several (SAM2), and on sets of objects with their masks (SAM3)."""

from trainer.losses.best_mask import BestMaskLoss
from trainer.losses.masks import DiceCrossEntropy, by_mask, resize_logits
from trainer.losses.matching import HungarianMatcher, Matches, OneToManyMatcher, Pairs
from trainer.losses.set_prediction import SetPredictionLoss
from trainer.losses.sets import DenseMasks, FactoredMasks, ObjectSets, QueryMasks, SetPrediction

__all__ = [
    "BestMaskLoss",
    "DenseMasks",
    "DiceCrossEntropy",
    "FactoredMasks",
    "HungarianMatcher",
    "Matches",
    "ObjectSets",
    "OneToManyMatcher",
    "Pairs",
    "QueryMasks",
    "SetPrediction",
    "SetPredictionLoss",
    "by_mask",
    "resize_logits",
]
