"""SAM2 for single images as two graphs: an image encoder and a mask decoder.

Shapes: B images, Q objects, P points an object, C channels, S input side, g = S/16 side of the features, h = w = 4 g.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from trainer.export.base import PromptConsumer
from trainer.export.graphs import Graph, GraphFamily, Runner
from trainer.export.graphs_sam import (
    DECODER,
    EMBEDDINGS,
    ENCODER,
    IMAGES,
    MASKS,
    PROMPT_AXES,
    SCORES,
    notes_of,
    prompt_consumer,
    prompt_inputs,
)
from trainer.models import SegmentationModel

if TYPE_CHECKING:
    from trainer.models import SAM2

HIGH = ("high_res_features_0", "high_res_features_1")
"""The two finer levels of the features."""
_IMAGES_ALONE = (
    "For single images: SAM2's memory, which follows objects through slices and frames, is not in these graphs. "
    "Points and boxes need no padding: the graph adds what SAM2 adds itself."
)


class SAM2Graphs(GraphFamily):
    """SAM2's image encoder, with what it adds to an image without a memory, and its prompt encoder and mask decoder."""

    stems = (ENCODER, DECODER)

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__(model)
        self.mask_side = side = model.mask_side
        width = cast("SAM2", model).hidden_dim
        sizes = ((EMBEDDINGS, width, side // 4), (HIGH[0], width // 8, side), (HIGH[1], width // 4, side // 2))
        features = " and ".join(f"{name} (batch, {channels}, {g}, {g})" for name, channels, g in sizes)
        self.notes = (*notes_of(model, features), _IMAGES_ALONE)

    def graphs(self, model: SegmentationModel) -> list[Graph]:
        """The image encoder and the mask decoder."""
        sam2 = cast("SAM2", model)
        images = torch.rand(IMAGES, 3, self.image_size, self.image_size, generator=torch.Generator().manual_seed(0))
        encoder, decoder = _Encoder(sam2).eval(), _Decoder(sam2).eval()
        names, batch = (EMBEDDINGS, *HIGH), {0: "batch"}
        with torch.no_grad():
            features = dict(zip(names, encoder(images), strict=True))
        asked = {**features, **prompt_inputs(model)}
        axes = {**dict.fromkeys(names, batch), **PROMPT_AXES}
        return [
            Graph(ENCODER, encoder, {"images": images}, names, {"images": batch}),
            Graph(DECODER, decoder, asked, (MASKS, SCORES), axes),
        ]

    def consumer(self, runners: Mapping[str, Runner]) -> PromptConsumer:
        """Image and prompts of any form."""
        return prompt_consumer(runners, self.mask_side, padded=False)


class _Encoder(nn.Module):
    """Images (B, 3, S, S) → features without a memory (B, C, g, g), (B, C/8, 4 g, 4 g) and (B, C/4, 2 g, 2 g)."""

    def __init__(self, model: SAM2) -> None:
        super().__init__()
        self.image_encoder, self.no_mem_embed = model.image_encoder, model.no_mem_embed
        self.sam_mask_decoder = nn.Module()  # of which the encoder's graph needs no more
        self.sam_mask_decoder.conv_s0 = model.sam_mask_decoder.conv_s0
        self.sam_mask_decoder.conv_s1 = model.sam_mask_decoder.conv_s1
        self._whole = (model,)  # in a tuple, so that the rest is not registered

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with _no_positions(self.image_encoder.neck.position_encoding):
            features = self._whole[0].encode(images)
        # not `without_memory`, whose parameter is the model's and not this graph's
        return features.top + self.no_mem_embed[0, 0, :, None, None], *features.high


@contextmanager
def _no_positions(encoding: nn.Module) -> Iterator[None]:
    """Positions that the memory alone reads would travel as constants, larger than all weights together."""
    encoding.forward = lambda level: level.new_zeros(1)
    try:
        yield
    finally:
        del encoding.forward


class _Decoder(nn.Module):
    """What `SAM2.decode` computes, of prompts in one form for all that may be asked."""

    def __init__(self, model: SAM2) -> None:
        super().__init__()
        self.sam_prompt_encoder, self.sam_mask_decoder = model.sam_prompt_encoder, model.sam_mask_decoder

    def forward(
        self,
        top: Tensor,
        high: Tensor,
        middle: Tensor,
        image_index: Tensor,
        points: Tensor,
        labels: Tensor,
        masks: Tensor,
        has_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        sparse, without = self.sam_prompt_encoder(points=(points, labels), boxes=None, masks=None)
        shown = has_mask[:, None, None, None] > 0.5
        found = self.sam_mask_decoder(
            image_embeddings=top[image_index],
            image_pe=self.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=torch.where(shown, self.sam_prompt_encoder.mask_downscaling(masks), without),
            multimask_output=False,
            repeat_image=False,
            high_res_features=[high[image_index], middle[image_index]],
        )
        return found[0], found[1]
