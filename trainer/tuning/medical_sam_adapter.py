"""Medical SAM Adapter (Wu et al. 2023, arXiv:2304.12620): two adapters an encoder block, three a decoder block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel
from trainer.models.blocks import Block, DecoderBlock, decoder_blocks
from trainer.tuning.added import AddedTuning
from trainer.tuning.attach import attach
from trainer.tuning.bottleneck import (
    PART,
    Bottleneck,
    beside,
    channels,
    check_ratio,
    check_scale,
    put_after,
    put_beside_mlp,
)


class MedicalSAMAdapterTuning(AddedTuning):
    """Adapters behind attention and beside the MLP of every encoder block, and three in every block of the decoder.

    From the released code: a quarter of the width, GELU (the paper says ReLU), a skip around the adapter behind
    attention, and none but the factor 0.5 on the one beside the MLP, which sees the MLP's normalised tokens. Its blocks
    for TinyViT give that adapter tokens before the norm; here all families are alike.

    From the paper: the decoder's three, behind the cross-attention from tokens to image, beside the MLP, and behind the
    cross-attention from image to tokens. The released code has none of them. The paper's words leave open whether the
    first and the third come before the residual addition; here they do, as in the encoder.

    What learns besides: in the paper nothing, which is the default here; in the released code the whole mask decoder:
    that is ``decoder: false`` with ``train: [mask_decoder]``. The prompt encoder is frozen in both.

    Left out: the hyper-prompting adapter (the first of the decoder's, conditioned on the prompt) and the branch over
    depth for volumes. Up starts at zero here, so that nothing changes before training; in the released code it does
    not. Adapters are not linear, so they cannot be folded into the weights for exports.

    Args:
        ratio: Channels of an adapter over those of its block, above 0 and at most 1.
        scale: Factor on the adapters beside MLPs.
        decoder: Adapters in the mask decoder too.
        train: What learns fully besides, as name prefixes or shell patterns.
        rates: Factors on the learning rate by name prefix or shell pattern; where several fit, the last counts.
    """

    def __init__(
        self,
        ratio: float = 0.25,
        scale: float = 0.5,
        decoder: bool = True,
        train: Sequence[str] = (),
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(train, rates)
        self.ratio, self.scale, self.decoder = check_ratio(ratio), check_scale(scale), decoder

    def add(self, model: SegmentationModel, blocks: Sequence[Block]) -> None:
        """Put the adapters into the encoder and the decoder.

        Raises:
            UserError: The decoder is not SAM's.
        """
        decoding = decoder_blocks(model) if self.decoder else ()
        if self.decoder and not decoding:
            raise UserError(
                f"MedicalSAMAdapterTuning: {type(model).__name__} has no two-way blocks of SAM's decoder: set decoder "
                "to false"
            )
        for block in blocks:
            put_after(model, block.attention, self._adapter(block))
            put_beside_mlp(model, block, self._adapter(block, self.scale))
        for two_way in decoding:
            put_after(model, two_way.token_to_image, self._adapter(two_way))
            attach(model.get_submodule(two_way.mlp), PART, self._adapter(two_way, self.scale), beside)
            put_after(model, two_way.image_to_token, self._adapter(two_way))

    def _adapter(self, block: Block | DecoderBlock, scale: float = 1.0) -> Bottleneck:
        return Bottleneck(block.width, channels(block.width, self.ratio), scale=scale)
