"""What every model family offers to the modules, the tuning methods and the exports.

Shapes: B images, Q prompts, C channels, S input side, h w mask side, M masks a prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from trainer.models.blocks import Block, encoder_blocks
from trainer.models.preprocessing import Preprocessing


class SegmentationModel(nn.Module, ABC):
    """A promptable segmentation model: an image is encoded once, whatever the number of its prompts."""

    preprocessing: Preprocessing
    score_head: str | None
    """Name of the module that predicts a mask's quality, None without one; a loss on masks alone does not reach it."""
    specialist: ClassVar[bool] = False
    """Whether it is no foundation model: it knows nothing but the data that it is trained on."""
    decodes_whole: ClassVar[bool] = True
    """Whether its mask decoder is called as one module."""
    encoder = "image_encoder"
    """Name of the image encoder."""
    patch_embedding: tuple[str, ...]
    """Names of the modules and parameters that make tokens of pixels, with their absolute positions."""
    also_called: ClassVar[Mapping[str, str]] = {}
    """Names of this family's parts by what other families call them: a tuning's defaults fit all."""
    fixed: tuple[str, ...] = ()
    """Names of parameters that never learn: buffers in the original, or such that no output depends on them."""

    @property
    @abstractmethod
    def mask_side(self) -> int:
        """Side h = w in pixels of the masks that `decode` gives, and that it takes as prompts."""

    @abstractmethod
    def encode(self, images: Tensor) -> Any:
        """Encode images (B, C, S, S) into features that `decode` takes."""

    @abstractmethod
    def decode(self, features: Any, prompts: Any) -> tuple[Tensor, Tensor]:
        """Predict mask logits (Q, M, h, w) and quality scores (Q, M).

        Args:
            features: What `encode` gave.
            prompts: What the family is asked: `Prompts` of one form, or `ConceptPrompts`.
        """

    def blocks(self) -> tuple[Block, ...]:
        """The encoder's transformer blocks, from the input on."""
        return encoder_blocks(self)

    def block_kinds(self) -> dict[str, list[nn.Module]]:
        """Transformer blocks by kind: what is compiled one by one, and sharded over ranks one by one.

        Each is called as a module, once in every pass in training, whatever is asked.
        """
        return {self.encoder: [self.get_submodule(block.name) for block in self.blocks()]}

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter by name: patch embedding 0, blocks 1 to n, neck and heads n + 1."""
        names = [block.name + "." for block in self.blocks()]
        ids = {}
        for name, _ in self.named_parameters():
            inside = (depth for depth, block in enumerate(names, start=1) if name.startswith(block))
            first = any(name == part or name.startswith(part + ".") for part in self.patch_embedding)
            ids[name] = 0 if first else next(inside, len(names) + 1)
        return ids

    @abstractmethod
    def at_size(self, image_size: int) -> SegmentationModel:
        """A copy with the same weights that takes another input side in pixels; adapters have been merged."""

    def train(self, mode: bool = True) -> SegmentationModel:
        """Switch training on or off; batch-norm statistics stay frozen either way.

        They are per rank and drift at the small batches of fine-tuning; their scale and shift still learn.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self
