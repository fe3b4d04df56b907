"""Points on the target and beside it.

Shapes: Q targets, P points a target, S the model's input side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.errors import UserError
from data_shards.seed import run_seed, stream
from trainer.prompts.base import Prompter, Prompts, Truth
from trainer.prompts.regions import DRAWN_BELOW, drawn, first_with_pixels, innermost, inside, near, on_target


class PointPrompts(Prompter):
    """Points on the target, drawn uniformly as in SAM's training, and points near it that are not on it.

    In evaluation a point is the pixel farthest from the border of its region (Kirillov et al. 2023, arXiv:2304.02643,
    appendix D.1); each point counts as border for the next. Points beside the target are taken from its box, enlarged
    on every side by half of the longer one, and from the whole image where the target fills that.

    Args:
        positive: Points on the target, 1 or more.
        negative: Points beside it.
        seed: Seed of the points; that of the run (`seed_everything`) if null.
    """

    def __init__(self, positive: int = 1, negative: int = 0, seed: int | None = None) -> None:
        if positive < 1 or negative < 0:
            raise UserError(f"PointPrompts: positive is 1 or more, negative 0 or more, not {positive} and {negative}")
        self.positive, self.negative, self.seed = positive, negative, run_seed(seed)

    def describe(self) -> dict[str, Any]:
        """What an evaluation asks, as JSON."""
        return {"kind": type(self).__name__, "positive": self.positive, "negative": self.negative}

    def first(self, truth: Truth, epoch: int | None) -> list[Prompts]:
        """Ask for every target with points."""
        target = on_target(truth)
        wanted = [(target, self.positive, 1)]
        if self.negative:
            beside = inside(truth) & ~target
            wanted.append((first_with_pixels(beside & near(truth), beside), self.negative, 0))
        numbers = None if epoch is None else self._numbers(truth, epoch).split([count for _, count, _ in wanted], dim=1)
        points, labels = [], []
        for part, (regions, count, label) in enumerate(wanted):
            found, there = innermost(regions, count) if numbers is None else drawn(regions, numbers[part])
            points.append(found)
            labels.append(torch.where(there, label, -1)[:, None].expand(-1, count))
        rows = torch.arange(len(truth))
        return [Prompts(truth.image_index, points=torch.cat(points, 1), labels=torch.cat(labels, 1), rows=rows)]

    def _numbers(self, truth: Truth, epoch: int) -> Tensor:
        """Random numbers (Q, P), a pure function of (seed, epoch, sample, target)."""
        numbers = np.zeros((len(truth), self.positive + self.negative), dtype=np.int64)
        for row, draw in enumerate(truth.draws):
            numbers[row] = stream(self.seed, "points", epoch, *draw).integers(0, DRAWN_BELOW, size=numbers.shape[1])
        return torch.from_numpy(numbers)
