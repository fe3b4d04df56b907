"""What SAM, MedSAM and LiteMedSAM share: SAM's prompt encoder and mask decoder, from transformers.

Shapes: B images, Q prompts, P points a prompt, S input side, g side of the features (S / stride), h w = 4 g.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.sam.configuration_sam import (
    SamConfig,
    SamMaskDecoderConfig,
    SamPromptEncoderConfig,
    SamVisionConfig,
)
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

from trainer.models.base import SegmentationModel
from trainer.prompts.base import Prompts

WIDTH = 256
"""Channels of the features."""


class SAMDecoding(SegmentationModel):
    """A model with any image encoder, and SAM's prompt encoder and mask decoder."""

    score_head = "mask_decoder.iou_prediction_head"
    # a buffer in the original, a parameter in transformers
    fixed = ("prompt_encoder.shared_embedding.positional_embedding",)

    def add_decoder(self, image_size: int, stride: int, layer_norm_eps: float) -> None:
        """Make the prompt encoder and the mask decoder.

        Args:
            image_size: Input side S in pixels.
            stride: Input pixels to a side of a feature.
            layer_norm_eps: ε of the decoder's norms: the originals have 1e-5, transformers' default is 1e-6.
        """
        config = SamConfig(
            vision_config=SamVisionConfig(image_size=image_size, patch_size=stride, hidden_size=WIDTH),
            prompt_encoder_config=SamPromptEncoderConfig(image_size=image_size, patch_size=stride),
            mask_decoder_config=SamMaskDecoderConfig(layer_norm_eps=layer_norm_eps),
        )
        # used outside a PreTrainedModel, nobody chooses the attention kernel: fused, as transformers would by itself
        config.mask_decoder_config._attn_implementation = "sdpa"
        self.prompt_encoder = SamPromptEncoder(config)
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
        self.prompt_encoder.shared_embedding.positional_embedding.requires_grad_(False)

    @property
    def mask_side(self) -> int:
        """Four times the side of the features."""
        return 4 * int(self.prompt_encoder.image_embedding_size[0])

    def decode(self, features: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Predict one mask a prompt: logits (Q, 1, h, w) and predicted IoU (Q, 1)."""
        points, labels, boxes, masks = prompts.points, prompts.labels, prompts.boxes, prompts.masks
        with torch.autocast(features.device.type, enabled=False):  # bf16 would round coordinates to some two pixels
            sparse, dense = self.prompt_encoder(
                input_points=None if points is None else points[:, None],
                input_labels=None if labels is None else labels[:, None],
                input_boxes=None if boxes is None else boxes[:, None],
                input_masks=None if masks is None else masks[:, None].float(),
            )
            positions = self._positions(features.shape[-1])
        logits, scores = self.mask_decoder(
            image_embeddings=features[prompts.image_index],
            image_positional_embeddings=positions.expand(len(prompts), -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return logits[:, 0], scores[:, 0]

    def _positions(self, side: int) -> Tensor:
        """Positional encoding of the features' grid: (1, 256, side, side)."""
        embedding = self.prompt_encoder.shared_embedding
        ticks = (torch.arange(side, device=embedding.positional_embedding.device, dtype=torch.float32) + 0.5) / side
        rows, columns = torch.meshgrid(ticks, ticks, indexing="ij")
        encoded: Tensor = embedding(torch.stack([columns, rows], dim=-1))
        return encoded.permute(2, 0, 1)[None]
