"""Boxes with SAM2's own noise.

Shapes: Q targets.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from trainer.prompts.sam_boxes import SAMBoxPrompts


class SAM2BoxPrompts(SAMBoxPrompts):
    """Boxes around the truth, each coordinate moved inwards or outwards by uniform noise, as in SAM2's training.

    `SAMBoxPrompts` draws the same amounts as a normal distribution's deviation, after SAM's paper; SAM2's released code
    (`sample_box_points`) draws from a uniform one, whose bounds these are. In evaluation boxes are tight.

    Args:
        noise: Largest move of a coordinate, as a fraction of the side's length.
        max_noise: Largest move of a coordinate in pixels of the model's input, whatever its size.
        seed: Seed of the noise; that of the run (`seed_everything`) if null.
    """

    def __init__(self, noise: float = 0.1, max_noise: float = 20.0, seed: int | None = None) -> None:
        super().__init__(noise, max_noise, seed)

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        return generator.uniform(-1, 1, 4)

    def _moves(self, drawn: Tensor, sides: Tensor) -> Tensor:
        return drawn * (sides * self.noise).clamp(max=self.max_noise)
