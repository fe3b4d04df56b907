"""SAM and MedSAM as transformers' SamModel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    Sam2ImageProcessor,
    Sam2Processor,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
)

from trainer.export.base import PromptConsumer
from trainer.export.transformers_family import Family, image_settings, load_strictly, promptable
from trainer.models.sam_names import TRANSFORMERS, rename

_SQUASHED = (
    "The run squashed images to a square, which SamProcessor cannot: AutoProcessor gives a Sam2Processor here, which "
    "squashes images and prompts alike, and SamModel takes what it makes."
)


class SAMFamily(Family):
    """SamModel holds all of SAM and of MedSAM."""

    @property
    def architecture(self) -> type[SamModel]:
        """SamModel."""
        return SamModel

    def config(self) -> SamConfig:
        """The configurations of our own parts, which are transformers'."""
        return SamConfig(
            vision_config=_settings(self.model.image_encoder),
            prompt_encoder_config={"image_size": self.side, "patch_size": self.model.shape.patch},
            mask_decoder_config=_settings(self.model.mask_decoder),
        )

    def renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our names are transformers' but for the image encoder's, and for a matrix that SamModel uses twice."""
        return rename(state, TRANSFORMERS, to_original=True)

    def processor(self) -> Any:
        """SAM's for images that are padded, SAM2's for those that are squashed."""
        settings = image_settings(self.model.preprocessing, self.model.mask_side)
        if self.model.preprocessing.resize == "squash":
            return Sam2Processor(Sam2ImageProcessor(**settings))
        return SamProcessor(SamImageProcessor(**settings))

    def answering(self, model: Any, folder: Path | None) -> PromptConsumer:
        """Ask with boxes, points and masks."""
        return promptable(model)

    def load(self, folder: Path) -> PromptConsumer:
        """Load SamModel."""
        return promptable(load_strictly(SamModel, folder))

    def notes(self, dtype: str) -> tuple[str, ...]:
        """Also which processor it is."""
        squashed = self.model.preprocessing.resize == "squash"
        return (*((_SQUASHED,) if squashed else ()), *super().notes(dtype))


def _settings(part: Any) -> dict[str, Any]:
    found: dict[str, Any] = part.config.to_dict()
    return found
