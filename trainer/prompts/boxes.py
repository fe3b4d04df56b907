"""Boxes around the truth.

Shapes: Q prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.errors import UserError
from data_shards.seed import run_seed
from trainer.prompts.base import Prompter, Prompts, Truth


class BoxPrompts(Prompter):
    """Boxes around the truth, each side pushed outwards by a random number of pixels.

    The shift is a pure function of (seed, epoch, sample, target): a resumed run, or one on another number of ranks,
    sees the same boxes.

    Args:
        max_shift: Largest outward shift of a side in training, in pixels of the model's input; a whole number from 0
            to `max_shift` is drawn for each side. MedSAM draws up to 20 px at 1024 px (Ma et al. 2024, Methods),
            LiteMedSAM up to 5 px at 256 px.
        eval_shift: Outward shift of every side in evaluation, in the same pixels.
        seed: Seed of the shifts; that of the run (`seed_everything`) if null.
    """

    def __init__(self, max_shift: int = 5, eval_shift: int = 0, seed: int | None = None) -> None:
        if max_shift < 0 or eval_shift < 0:
            raise UserError(f"max_shift and eval_shift are pixels >= 0, not {max_shift} and {eval_shift}")
        self.max_shift, self.eval_shift, self.seed = max_shift, eval_shift, run_seed(seed)

    def describe(self) -> dict[str, Any]:
        """What an evaluation asks, as JSON."""
        return {"kind": type(self).__name__, "eval_shift": self.eval_shift}

    def first(self, truth: Truth, epoch: int | None) -> list[Prompts]:
        """Ask for every target with its box."""
        rows = torch.arange(len(truth.draws))
        return [Prompts(truth.image_index, boxes=self(truth.boxes, truth.sizes, truth.draws, epoch), rows=rows)]

    def __call__(self, boxes: Tensor, sizes: Tensor, draws: Sequence[tuple[int, ...]], epoch: int | None) -> Tensor:
        """Move the sides of tight boxes outwards.

        Args:
            boxes: (Q, 4) tight boxes (x0, y0, x1, y1) in pixels of the model's input.
            sizes: (Q, 2) height and width, in the same pixels, of the image's valid area: boxes stay inside.
            draws: For each prompt (sample position in its corpus, target position in its sample), and in an epoch that
                shows a sample more than once, the number of the repeat.
            epoch: The epoch in training, None in evaluation.

        Returns:
            (Q, 4) boxes.
        """
        if epoch is None:
            shifts = torch.full_like(boxes, float(self.eval_shift))
        else:
            drawn = np.zeros((len(draws), 4), dtype=np.float32)
            for row, draw in enumerate(draws):
                generator = np.random.default_rng((self.seed, epoch, *draw))
                drawn[row] = generator.integers(0, self.max_shift, size=4, endpoint=True)
            shifts = torch.from_numpy(drawn).to(boxes)
        return push(boxes, shifts, sizes)


def push(boxes: Tensor, shifts: Tensor, sizes: Tensor) -> Tensor:
    """Push the sides of boxes outwards, or inwards up to the middle.

    Args:
        boxes: (Q, 4) as (x0, y0, x1, y1) in pixels of the model's input.
        shifts: (Q, 4) pixels for each side, below 0 inwards.
        sizes: (Q, 2) height and width, in the same pixels, of the image's valid area: boxes stay inside.

    Returns:
        (Q, 4) boxes.
    """
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    low = torch.minimum((boxes[:, :2] - shifts[:, :2]).clamp(min=0), middle)
    # scaled down, the last pixel's index lies a fraction beyond the limit: such a side stays where it is
    limit = torch.maximum(boxes[:, 2:], (sizes.flip(1) - 1).to(boxes))
    high = torch.maximum(torch.minimum(boxes[:, 2:] + shifts[:, 2:], limit), middle)
    return torch.cat([low, high], dim=1)
