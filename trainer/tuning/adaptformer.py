"""AdaptFormer (Chen et al. 2022, arXiv:2205.13535): one adapter beside the MLP of every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.models.base import SegmentationModel
from trainer.models.blocks import Block
from trainer.tuning.added import AddedTuning
from trainer.tuning.bottleneck import Bottleneck, check_bottleneck, check_scale, put_beside_mlp


class AdaptFormerTuning(AddedTuning):
    """One adapter beside the MLP of every block of the encoder: MLP(x) + s · Up(ReLU(Down(x))).

    x are the normalised tokens that the MLP sees. The released code gives the adapter the tokens before that norm, and
    drops a tenth of its hidden channels in training; neither is done here. Down starts as in the released code, Up at
    zero. Adapters are not linear, so they cannot be folded into the weights for exports.

    Args:
        bottleneck: Channels of an adapter.
        scale: The factor s.
        train: What learns fully besides, as name prefixes or shell patterns.
        rates: Factors on the learning rate by name prefix or shell pattern; where several fit, the last counts.
    """

    def __init__(
        self,
        bottleneck: int = 64,
        scale: float = 0.1,
        train: Sequence[str] = ("mask_decoder",),
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(train, rates)
        self.bottleneck, self.scale = check_bottleneck(bottleneck), check_scale(scale)

    def add(self, model: SegmentationModel, blocks: Sequence[Block]) -> None:
        """Put the adapter into every block."""
        for block in blocks:
            put_beside_mlp(model, block, Bottleneck(block.width, self.bottleneck, "relu", self.scale))
