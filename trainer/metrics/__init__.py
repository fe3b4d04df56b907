"""Metrics: overlap now, surfaces and statistics with evaluation."""

from trainer.metrics.overlap import overlap

__all__ = ["overlap"]
