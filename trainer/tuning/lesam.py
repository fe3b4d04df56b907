"""LeSAM's adapters (Gu et al. 2024, IEEE JBHI, doi:10.1109/JBHI.2024.3406871): two in every block, with GELU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.models.base import SegmentationModel
from trainer.models.blocks import Block
from trainer.tuning.added import AddedTuning
from trainer.tuning.bottleneck import Bottleneck, channels, check_ratio, put_after


class LeSAMTuning(AddedTuning):
    """Two adapters with GELU in every block of the encoder, their channels a ratio of the block's.

    As far as its abstract says, LeSAM learns medical knowledge in an efficient adaptation module, merges it with what
    the frozen SAM knows, and replaces the mask decoder by a light U-shaped one that it trains. The paper's text was not
    at hand: that the adapters stand behind attention and behind the MLP, each with a skip and before the residual
    addition, and the ratio of a quarter, are not checked against it. The U-shaped decoder is left out: SAM's own learns
    instead, so that a model still loads everywhere but for the adapters, which cannot be folded into the weights.

    Args:
        ratio: Channels of an adapter over those of its block, above 0 and at most 1.
        train: What learns fully besides, as name prefixes or shell patterns.
        rates: Factors on the learning rate by name prefix or shell pattern; where several fit, the last counts.
    """

    def __init__(
        self,
        ratio: float = 0.25,
        train: Sequence[str] = ("mask_decoder",),
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(train, rates)
        self.ratio = check_ratio(ratio)

    def add(self, model: SegmentationModel, blocks: Sequence[Block]) -> None:
        """Put both adapters into every block."""
        for block in blocks:
            for name in (block.attention, block.mlp):
                put_after(model, name, Bottleneck(block.width, channels(block.width, self.ratio)))
