"""Selective fine-tuning: some of the encoder's own parameters learn, and nothing is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel
from trainer.tuning.base import Tuning, freeze_all, unfreeze
from trainer.tuning.layers import is_norm


class SelectiveTuning(Tuning):
    """Chosen kinds of parameters of the image encoder learn, and the mask decoder fully.

    Args:
        norms: Scale and shift of every norm (LayerNorm, BatchNorm, GroupNorm and what the libraries make of them);
            a batch norm's statistics stay.
        biases: Every bias, also that of norms (BitFit: Ben Zaken et al. 2022, arXiv:2106.10199). Tables of relative
            positions are none.
        patch_embedding: What makes tokens of pixels, with absolute positions.
        last_blocks: The last n transformer blocks; the neck after them is none.
        train: What learns besides, as name prefixes or shell patterns.
        rates: Factors on the learning rate by name prefix or shell pattern; where several fit, the last counts.
    """

    def __init__(
        self,
        norms: bool = False,
        biases: bool = False,
        patch_embedding: bool = False,
        last_blocks: int = 0,
        train: Sequence[str] = ("mask_decoder",),
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(rates)
        if last_blocks < 0:
            raise UserError(f"last_blocks is 0 or more, not {last_blocks}")
        if not (norms or biases or patch_embedding or last_blocks):
            raise UserError(
                "SelectiveTuning selects nothing: set norms, biases, patch_embedding or last_blocks, or take "
                "FrozenEncoderTuning"
            )
        self.norms, self.biases, self.patch_embedding = norms, biases, patch_embedding
        self.last_blocks, self.trained = last_blocks, list(train)

    def apply(self, model: SegmentationModel) -> None:
        """Freeze everything, then let the chosen parameters and the named parts learn.

        Raises:
            UserError: There are fewer blocks than `last_blocks`, or a pattern matches nothing.
        """
        freeze_all(model)
        encoder = model.get_submodule(model.encoder)
        if self.norms:
            for module in filter(is_norm, encoder.modules()):
                module.requires_grad_(True)
        if self.biases:
            for name, parameter in encoder.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or name.rpartition(".")[2] == "bias")
        if self.patch_embedding:
            unfreeze(model, model.patch_embedding)
        blocks = [block.name for block in model.blocks()]
        if self.last_blocks > len(blocks):
            raise UserError(f"last_blocks {self.last_blocks}: {type(model).__name__} has {len(blocks)} in its encoder")
        unfreeze(model, blocks[len(blocks) - self.last_blocks :])
        unfreeze(model, self.trained)
