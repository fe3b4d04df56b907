"""What every model family offers to the modules, the tuning methods and the exports.

Shapes: B images, Q prompts, C channels, S input side, h w mask side, M masks a prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from trainer.models.preprocessing import Preprocessing
from trainer.prompts import Prompts


class SegmentationModel(nn.Module, ABC):
    """A promptable segmentation model: an image is encoded once, whatever the number of its prompts."""

    preprocessing: Preprocessing
    score_head: str
    """Name of the module that predicts a mask's quality; a loss on masks alone does not reach it."""

    @abstractmethod
    def encode(self, images: Tensor) -> Any:
        """Encode images (B, C, S, S) into features that `decode` takes."""

    @abstractmethod
    def decode(self, features: Any, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Predict mask logits (Q, M, h, w) and quality scores (Q, M)."""

    @abstractmethod
    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter by name, 0 at the input; heads share the highest number."""

    @abstractmethod
    def at_size(self, image_size: int) -> SegmentationModel:
        """A copy with the same weights that takes another input side in pixels; adapters have been merged."""

    @abstractmethod
    def lora_targets(self) -> str:
        """Regular expression over module names: where low-rank adapters go by default."""

    def train(self, mode: bool = True) -> SegmentationModel:
        """Switch training on or off; batch-norm statistics stay frozen either way.

        They are per rank and drift at the small batches of fine-tuning; their scale and shift still learn.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self
