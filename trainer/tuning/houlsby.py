"""Houlsby's adapters (Houlsby et al. 2019, arXiv:1902.00751): two bottlenecks in every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.models.base import SegmentationModel
from trainer.models.blocks import Block
from trainer.tuning.added import AddedTuning
from trainer.tuning.bottleneck import Bottleneck, check_bottleneck, put_after


class HoulsbyTuning(AddedTuning):
    """Two adapters in every block of the encoder: behind attention's projection and behind the MLP.

    Each is x + Up(GELU(Down(x))) and comes before the block's residual addition (the paper's figure 2; GELU and 64
    channels are its released code's). The paper's start near the identity is exact here. The paper also trains the
    layer norms and the task's head: the head is the mask decoder here; for the norms, add their names to `train`.
    Adapters are not linear, so they cannot be folded into the weights for exports.

    Args:
        bottleneck: Channels of an adapter.
        train: What learns fully besides, as name prefixes or shell patterns.
        rates: Factors on the learning rate by name prefix or shell pattern; where several fit, the last counts.
    """

    def __init__(
        self,
        bottleneck: int = 64,
        train: Sequence[str] = ("mask_decoder",),
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(train, rates)
        self.bottleneck = check_bottleneck(bottleneck)

    def add(self, model: SegmentationModel, blocks: Sequence[Block]) -> None:
        """Put both adapters into every block."""
        for block in blocks:
            for name in (block.attention, block.mlp):
                put_after(model, name, Bottleneck(block.width, self.bottleneck))
