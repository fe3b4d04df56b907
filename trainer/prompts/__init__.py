"""Prompts simulated from ground truth."""

from trainer.prompts.base import Prompter, Prompts, Truth, bucket_of, prompts_of_targets
from trainer.prompts.boxes import BoxPrompts
from trainer.prompts.clicks import ClickPrompts
from trainer.prompts.concepts import Concept, ConceptPrompts, concepts_of
from trainer.prompts.exemplars import Exemplars
from trainer.prompts.given import GivenMaskPrompts
from trainer.prompts.masks import MaskPrompts
from trainer.prompts.mixed import MixedPrompts
from trainer.prompts.points import PointPrompts
from trainer.prompts.sam2_boxes import SAM2BoxPrompts
from trainer.prompts.sam_boxes import SAMBoxPrompts
from trainer.prompts.wording import Wording

__all__ = [
    "BoxPrompts",
    "ClickPrompts",
    "Concept",
    "ConceptPrompts",
    "Exemplars",
    "GivenMaskPrompts",
    "MaskPrompts",
    "MixedPrompts",
    "PointPrompts",
    "Prompter",
    "Prompts",
    "SAM2BoxPrompts",
    "SAMBoxPrompts",
    "Truth",
    "Wording",
    "bucket_of",
    "concepts_of",
    "prompts_of_targets",
]
