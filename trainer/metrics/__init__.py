"""Metrics: overlap and surfaces of images and of volumes, agreement of their sizes, detection of lesions."""

from trainer.metrics.agreement import Agreement, agreement
from trainer.metrics.detection import Detection, Lesion, detect, pool
from trainer.metrics.overlap import overlap
from trainer.metrics.surface import hd95, nsd
from trainer.metrics.volumes import VolumeScores, slice_dsc, volume_scores

__all__ = [
    "Agreement",
    "Detection",
    "Lesion",
    "VolumeScores",
    "agreement",
    "detect",
    "hd95",
    "nsd",
    "overlap",
    "pool",
    "slice_dsc",
    "volume_scores",
]
