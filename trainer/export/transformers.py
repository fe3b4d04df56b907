"""A folder that transformers' own `from_pretrained` loads: configuration, weights, image processor, tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetensors.torch import save_file

from trainer.export.base import DTYPES, Exporter, InputConsumer, PromptConsumer, TextConsumer, VideoConsumer
from trainer.models import SAM3, MedSAM, SAM2Shape, SegmentationModel

if TYPE_CHECKING:
    from trainer.export.transformers_family import Family


class TransformersExporter(Exporter):
    """What `save_pretrained` would write; the consumer is the class of transformers, and its image processor."""

    name = "transformers"
    suffix = ""
    package = "transformers"
    also = ("torchvision",)
    requirement = "transformers torchvision"
    asks: Literal["boxes", "texts", "prompts", "prompts and frames"] = "prompts and frames"  # at most
    samples = 2
    image_size = 1024
    family: Family

    def accepts(self, model: SegmentationModel) -> bool:
        """Whether transformers has a class for the model.

        Raises:
            UserError: It has, but not in the model's sizes.
        """
        return has_class(model, self.name)

    def for_model(self, model: SegmentationModel) -> TransformersExporter:
        """The export to the class that transformers has for the model, at the model's own input side."""
        family = family_of(model)
        assert family is not None
        found = copy.copy(self)
        found.family, found.asks, found.image_size = family, family.asks, family.side
        found.notes = family.notes(self.dtype)
        return found

    def write(self, model: SegmentationModel, path: Path) -> None:
        """Write the weights in one file, the configuration, and what makes a user's images and texts into input."""
        from trainer.export.transformers_family import WEIGHTS

        state = self.family.renamed(self.state(model))
        save_file({name: one.contiguous() for name, one in state.items()}, path / WEIGHTS, metadata={"format": "pt"})
        config = self.family.config()
        config.architectures, config.dtype = [self.family.architecture.__name__], DTYPES[self.dtype]
        config.save_pretrained(path)
        processor = self.family.processor()
        processor.save_pretrained(path)
        processor.image_processor.save_pretrained(path)  # by itself too, for what reads images only

    def read_input(self, path: Path) -> InputConsumer:
        """The image processor that the folder names."""
        from trainer.export.transformers_family import read_images

        return read_images(path)

    def load(self, path: Path) -> PromptConsumer | TextConsumer | VideoConsumer:
        """Load the folder by `from_pretrained`."""
        return self.family.load(path)


def has_class(model: SegmentationModel, to: str) -> bool:
    """Whether transformers has a class for a model.

    Args:
        model: The model.
        to: Name of the format, which the error begins with.

    Raises:
        UserError: It has, but not in the model's sizes.
    """
    family = family_of(model)
    if family is not None:
        family.check(to)
    return family is not None


def family_of(model: SegmentationModel) -> Family | None:
    """What a model is in transformers; None where transformers has no class for it."""
    if isinstance(model, MedSAM):
        from trainer.export.transformers_sam import SAMFamily

        return SAMFamily(model)
    if isinstance(model, SAM3):
        from trainer.export.transformers_sam3 import SAM3Family

        return SAM3Family(model)
    if isinstance(getattr(model, "shape", None), SAM2Shape):
        from trainer.export.transformers_sam2 import SAM2Family

        return SAM2Family(model)
    return None
