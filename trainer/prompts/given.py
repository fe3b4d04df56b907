"""The mask itself, given as the answer.

Shapes: Q targets, S the model's input side.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.prompts.base import Prompter, Prompts, Truth


class GivenMaskPrompts(Prompter):
    """The true mask itself, which SAM2 takes for the answer: its decoder then only makes the object's pointer.

    So half of SAM2's training clips begin; the model learns from the frames that follow. Nothing is random.
    Source: Ravi et al. 2024 (arXiv:2408.00714), appendix, "Full training".
    """

    def describe(self) -> dict[str, Any]:
        """What an evaluation asks, as JSON."""
        return {"kind": type(self).__name__}

    def first(self, truth: Truth, epoch: int | None) -> list[Prompts]:
        """Give every target's mask."""
        return [Prompts(truth.image_index, given=truth.masks, rows=torch.arange(len(truth)))]
