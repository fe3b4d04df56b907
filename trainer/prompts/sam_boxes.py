"""Boxes with SAM's own noise.

Shapes: Q targets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.errors import UserError
from data_shards.seed import run_seed, stream
from trainer.prompts.base import Prompter, Prompts, Truth


class SAMBoxPrompts(Prompter):
    """Boxes around the truth, each coordinate moved inwards or outwards by Gaussian noise, as in SAM's training.

    Source: Kirillov et al. 2023 (arXiv:2304.02643), appendix A, "Training algorithm". In evaluation boxes are tight.

    Args:
        noise: Standard deviation of the noise, as a fraction of the side's length.
        max_noise: Largest move of a coordinate in pixels of the model's input; SAM's 20 px are at 1024 px.
        seed: Seed of the noise; that of the run (`seed_everything`) if null.
    """

    def __init__(self, noise: float = 0.1, max_noise: float = 20.0, seed: int | None = None) -> None:
        if not (0 <= noise < float("inf") and 0 <= max_noise < float("inf")):
            raise UserError(
                f"{type(self).__name__}: noise {noise} is a fraction of a side and max_noise {max_noise} are pixels, "
                ">= 0"
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
                drawn[row] = self._draw(stream(self.seed, "box_noise", epoch, *draw))
            sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
            boxes = moved(boxes, self._moves(torch.from_numpy(drawn).to(boxes), sides), truth.sizes)
        return [Prompts(truth.image_index, boxes=boxes, rows=torch.arange(len(truth)))]

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        """Four random numbers, one for each coordinate."""
        return generator.standard_normal(4)

    def _moves(self, drawn: Tensor, sides: Tensor) -> Tensor:
        """How far coordinates move, by what was drawn and the lengths of their sides: (Q, 4) each."""
        return (drawn * self.noise * sides).clamp(-self.max_noise, self.max_noise)


def moved(boxes: Tensor, moves: Tensor, sizes: Tensor) -> Tensor:
    """Move the coordinates of boxes (Q, 4) by (Q, 4) pixels, inside the valid areas (Q, 2), as height and width."""
    # scaled down, the last pixel's index lies a fraction beyond the image: such a side may stay where it is
    limit = torch.maximum((sizes.flip(1) - 1).to(boxes), boxes[:, 2:])
    corners = torch.minimum((boxes + moves).clamp(min=0), limit.repeat(1, 2)).unflatten(1, (2, 2))
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)  # much noise can swap the sides of a box
