"""Slices or frames that belong together, read one by one.

Shapes: D slices, C channels, H W native height and width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Stack(Protocol):
    """The slices of a volume or the frames of a video: nothing that takes one needs the whole of it in memory."""

    @property
    def name(self) -> str:
        """What messages call it: its path, or the volume's name."""

    @property
    def size(self) -> tuple[int, int]:
        """Native height and width (H, W)."""

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Millimetres between slices, rows and columns; None where they are not known."""

    def __len__(self) -> int:
        """Number D of slices."""

    def image(self, number: int) -> Tensor:
        """Read a slice: (C, H, W) with 1 or 3 channels, as a model's preprocessing takes it."""
