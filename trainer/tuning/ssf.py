"""SSF: a learned scale and shift after every layer (Lian et al. 2022, arXiv:2210.08823)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.base import SegmentationModel
from trainer.models.blocks import Block
from trainer.tuning.added import AddedTuning
from trainer.tuning.attach import attach, attached, detach
from trainer.tuning.layers import channels_last, is_norm

NAME = "ssf"
_MAPS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class ScaleShift(nn.Module):
    """Multiplies every channel by a scale, which starts at 1, and adds a shift, which starts at 0."""

    def __init__(self, channels: int, last: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.shape = (-1,) if last else (-1, 1, 1)

    def forward(self, output: Tensor) -> Tensor:
        """Change (..., C), or (B, C, h, w)."""
        # to the output's type: under autocast single-precision parameters would make all that follows single
        scale, shift = self.scale.to(output.dtype), self.shift.to(output.dtype)
        return torch.addcmul(shift.view(self.shape), output, scale.view(self.shape))


class SSFTuning(AddedTuning):
    """The encoder keeps its weights and learns a scale and a shift after its layers; the mask decoder learns fully.

    After every norm, linear layer and convolution that has a bias, the patch embedding's among them. A layer without
    one has nothing to fold a shift into, and adding a bias would change the model's layout; such a layer is nearly
    always followed by a norm, whose scale and shift do the same. SAM3's patch embedding is the exception.
    The paper draws the start from normal distributions around 1 and 0 of deviation 0.02; here it is 1 and 0, so
    that the model starts unchanged.

    Args:
        train: What learns fully besides, as name prefixes or shell patterns.
        rates: Factors on the learning rate by name prefix or shell pattern; where several fit, the last counts.
    """

    def __init__(self, train: Sequence[str] = ("mask_decoder",), rates: Mapping[str, float] | None = None) -> None:
        super().__init__(train, rates)

    def add(self, model: SegmentationModel, blocks: Sequence[Block]) -> None:
        """Add a scale and a shift to every layer of the encoder that has a bias."""
        for module in [*model.get_submodule(model.encoder).modules()]:
            bias = getattr(module, "bias", None)
            if (isinstance(module, _MAPS) or is_norm(module)) and isinstance(bias, nn.Parameter):
                attach(module, NAME, ScaleShift(len(bias), channels_last(module)), _change)

    @torch.no_grad()
    def merge(self, model: SegmentationModel) -> None:
        """Fold every scale and shift into the weight and bias of the layer before it."""
        for module in attached(model, NAME):
            part = detach(module, NAME)
            assert isinstance(part, ScaleShift)
            weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
            rows = weight.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else weight
            rows.mul_(part.scale.view(-1, *[1] * (weight.ndim - 1)))
            bias.mul_(part.scale).add_(part.shift)


def _change(part: nn.Module, given: Any, output: Any) -> Any:
    return part(output)
