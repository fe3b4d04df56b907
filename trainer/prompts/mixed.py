"""Prompts of several forms in one training.

Shapes: Q targets.
"""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.errors import UserError
from data_shards.seed import run_seed, stream
from trainer.prompts.base import Prompter, Prompts, Truth, merged


class MixedPrompts(Prompter):
    """Each target is asked about by one of several prompters, drawn anew in every epoch of training.

    Args:
        prompters: The prompters. None that corrects, as `ClickPrompts`: that takes the mixture as its `start`.
        weights: How often each is drawn, relative to the others; equally often if null.
        eval_prompter: Position, from 0, of the one that asks about every target in evaluation.
        seed: Seed of the choice; that of the run (`seed_everything`) if null.
    """

    def __init__(
        self,
        prompters: list[Prompter],
        weights: list[float] | None = None,
        eval_prompter: int = 0,
        seed: int | None = None,
    ) -> None:
        weights = [1.0] * len(prompters) if weights is None else weights
        if not prompters:
            raise UserError("MixedPrompts: prompters is empty: name at least one")
        for prompter in prompters:
            if isinstance(prompter, MixedPrompts):
                raise UserError("MixedPrompts: a mixture in a mixture: write its prompters into this one, with weights")
            if prompter.rounds(0) or prompter.rounds(None):
                name = type(prompter).__name__
                raise UserError(f"MixedPrompts: {name} corrects: make the mixture the `start` of {name} instead")
        if len(weights) != len(prompters) or not all(isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
            raise UserError(
                f"MixedPrompts: weights {weights}: one number >= 0 for each of {len(prompters)} prompters, not all 0"
            )
        if not 0 <= eval_prompter < len(prompters):
            raise UserError(f"MixedPrompts: eval_prompter {eval_prompter} is a position from 0 to {len(prompters) - 1}")
        self.prompters, self.eval_prompter, self.seed = prompters, eval_prompter, run_seed(seed)
        self.shares = np.cumsum(weights) / sum(weights)

    def describe(self) -> dict[str, Any]:
        """What an evaluation asks, as JSON."""
        return {"kind": type(self).__name__, "first": self.prompters[self.eval_prompter].describe()}

    def first(self, truth: Truth, epoch: int | None) -> list[Prompts]:
        """Ask about every target once, in prompts of as many forms as the prompters have."""
        if epoch is None or not len(truth):
            return self.prompters[self.eval_prompter].first(truth, epoch)
        choice = self._choice(truth, epoch)
        asked = []
        for number, prompter in enumerate(self.prompters):
            rows = (choice == number).nonzero()[:, 0]
            if len(rows):
                for part in prompter.first(truth.subset(rows), epoch):
                    asked.append(replace(part, rows=rows if part.rows is None else rows[part.rows]))
        return merged(asked)

    def _choice(self, truth: Truth, epoch: int) -> Tensor:
        """Which prompter asks about each target: (Q,) int64, a pure function of (seed, epoch, sample, target)."""
        numbers = [stream(self.seed, "mixture", epoch, *draw).random() for draw in truth.draws]
        return torch.from_numpy(np.searchsorted(self.shares, numbers, side="right").clip(max=len(self.prompters) - 1))
