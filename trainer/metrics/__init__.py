"""Metrics: overlap and surfaces now, statistics with evaluation."""

from trainer.metrics.overlap import overlap
from trainer.metrics.surface import nsd

__all__ = ["nsd", "overlap"]
