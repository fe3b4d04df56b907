"""What every export offers to the gate.

Shapes: Q prompts, S the consumer's input side, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from trainer.models import SegmentationModel

ConsumerModel = Callable[[Tensor, Tensor], Tensor]
"""The consumer's own model: image (1, C, S, S) and boxes (Q, 4) in its pixels → mask logits (Q, S, S)."""


class Exporter(ABC):
    """One format, the tool that reads it, and how that tool loads it."""

    name: str
    """What ``--to`` takes."""
    suffix: str
    """How the file's name ends."""
    package: str
    """The consumer's distribution."""
    requirement: str
    """What to install for the gate."""
    image_size: int
    """Input side S in pixels that the consumer runs at."""
    notes: tuple[str, ...] = ()
    """What a user of the consumer should know."""

    @abstractmethod
    def accepts(self, model: SegmentationModel) -> bool:
        """Whether the format can hold this model."""

    @abstractmethod
    def write(self, model: SegmentationModel, path: Path) -> None:
        """Write the file; adapters have been merged."""

    @abstractmethod
    def load(self, path: Path) -> ConsumerModel:
        """Load the file with the consumer's own code, strictly.

        Raises:
            ImportError: The consumer is not installed.
            Exception: Whatever the consumer raises at a file that does not fit.
        """
