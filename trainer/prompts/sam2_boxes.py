"""Boxes with SAM2's own noise.

Shapes: Q targets.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
import torch

from data_shards.errors import UserError
from data_shards.seed import run_seed, stream
from trainer.prompts.base import Prompter, Prompts, Truth
from trainer.prompts.sam_boxes import moved


class SAM2BoxPrompts(Prompter):
    """Boxes around the truth, each coordinate moved inwards or outwards by uniform noise, as in SAM2's training.

    `SAMBoxPrompts` draws the same amounts as a normal distribution's deviation, after SAM's paper; SAM2's released code
    (`sample_box_points`) draws from a uniform one, whose bounds these are. In evaluation boxes are tight.

    Args:
        noise: Largest move of a coordinate, as a fraction of the side's length.
        max_noise: Largest move of a coordinate in pixels of the model's input, whatever its size.
        seed: Seed of the noise; that of the run (`seed_everything`) if null.
    """

    def __init__(self, noise: float = 0.1, max_noise: float = 20.0, seed: int | None = None) -> None:
        if not (0 <= noise < inf and 0 <= max_noise < inf):
            raise UserError(
                f"SAM2BoxPrompts: noise {noise} is a fraction of a side and max_noise {max_noise} are pixels, >= 0"
            )
        self.noise, self.max_noise, self.seed = noise, max_noise, run_seed(seed)

    def describe(self) -> dict[str, Any]:
        """What an evaluation asks, as JSON."""
        return {"kind": type(self).__name__}

    def first(self, truth: Truth, epoch: int | None) -> list[Prompts]:
        """Ask for every target with its box."""
        boxes = truth.boxes
        if epoch is not None:
            drawn = np.zeros((len(truth), 4), dtype=np.float32)
            for row, draw in enumerate(truth.draws):
                drawn[row] = stream(self.seed, "box_noise", epoch, *draw).uniform(-1, 1, 4)
            largest = ((boxes[:, 2:] - boxes[:, :2]) * self.noise).clamp(max=self.max_noise).repeat(1, 2)
            boxes = moved(boxes, torch.from_numpy(drawn).to(boxes) * largest, truth.sizes)
        return [Prompts(truth.image_index, boxes=boxes, rows=torch.arange(len(truth)))]
