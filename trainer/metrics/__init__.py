"""Metrics: overlap and surfaces, of images and of volumes."""

from trainer.metrics.overlap import overlap
from trainer.metrics.surface import nsd
from trainer.metrics.volumes import VolumeScores, slice_dsc, volume_scores

__all__ = ["VolumeScores", "nsd", "overlap", "slice_dsc", "volume_scores"]
