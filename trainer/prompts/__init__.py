"""Prompts simulated from ground truth."""

from trainer.prompts.base import Prompter, Prompts, Truth, prompts_of_targets
from trainer.prompts.boxes import BoxPrompts
from trainer.prompts.clicks import ClickPrompts
from trainer.prompts.masks import MaskPrompts
from trainer.prompts.mixed import MixedPrompts
from trainer.prompts.points import PointPrompts
from trainer.prompts.sam_boxes import SAMBoxPrompts

__all__ = [
    "BoxPrompts",
    "ClickPrompts",
    "MaskPrompts",
    "MixedPrompts",
    "PointPrompts",
    "Prompter",
    "Prompts",
    "SAMBoxPrompts",
    "Truth",
    "prompts_of_targets",
]
