"""SAM, MedSAM and LiteMedSAM as two graphs: an image encoder and a mask decoder.

Shapes: B images, Q objects, P points an object, C channels, S input side, g side of the features, h = w = 4 g.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.models.tiny_vit import Attention
from torch import Tensor, nn

from trainer.export.base import PromptConsumer
from trainer.export.graphs import Graph, GraphFamily, Runner
from trainer.models import SegmentationModel
from trainer.models.sam import SAMDecoding
from trainer.prompts import Prompts

ENCODER, DECODER = "image_encoder", "mask_decoder"
"""The graphs' stems."""
EMBEDDINGS = "image_embeddings"
MASKS, SCORES = "low_res_masks", "iou_predictions"
"""Names of SAM's own ONNX export, where it has them."""
IMAGES, OBJECTS, POINTS = 2, 3, 4
"""Lengths of the dynamic axes in the examples."""
SUREST = 32.0
"""Largest logit of the example of a mask to start from."""

_ASKED = (
    f"{ENCODER}: images (batch, 3, {{side}}, {{side}}) as preprocessing.json says → {{features}}.",
    f"{DECODER}: these features; image_index (objects) int64, the image of the batch that each object is in; "
    "point_coords (objects, points, 2) as (x, y) in pixels of the input; point_labels (objects, points) int64: 1 on "
    "the object, 0 beside it, 2 and 3 a box's upper left and lower right corner, -1 padding; mask_input (objects, 1, "
    "{mask}, {mask}), logits of a mask to start from; has_mask_input (objects) float32, 1 where there is one and 0 "
    f"where not → {MASKS} (objects, 1, {{mask}}, {{mask}}), logits, and {SCORES} (objects, 1).",
    "Masks back at an image's own size: resize to the input's side, cut off what was padded, resize to the image, see "
    "preprocessing.json.",
)
_PADDED = "Points without a box end in one more at (0, 0) labelled -1, as in SAM's own ONNX export; a box has none."


def notes_of(model: SegmentationModel, features: str) -> tuple[str, ...]:
    """What the two graphs take and give.

    Args:
        model: The model.
        features: What the encoder gives, in words.
    """
    sizes = {"side": model.preprocessing.image_size, "mask": model.mask_side, "features": features}
    return tuple(note.format(**sizes) for note in _ASKED)


def prompt_inputs(model: SegmentationModel) -> dict[str, Tensor]:
    """Examples of what every mask decoder is asked, by name."""
    drawn = torch.Generator().manual_seed(0)
    side, mask = model.preprocessing.image_size, model.mask_side
    return {
        "image_index": torch.arange(OBJECTS) % IMAGES,
        "point_coords": torch.rand(OBJECTS, POINTS, 2, generator=drawn) * side,
        "point_labels": torch.tensor([[1, 0, -1, -1], [2, 3, -1, -1], [1, 2, 3, 0]]),
        "mask_input": (torch.rand(OBJECTS, 1, mask, mask, generator=drawn) - 0.5) * SUREST,
        "has_mask_input": torch.tensor([1.0, 0.0, 1.0]),
    }


PROMPT_AXES: dict[str, dict[int, str]] = {
    "image_index": {0: "objects"},
    "point_coords": {0: "objects", 1: "points"},
    "point_labels": {0: "objects", 1: "points"},
    "mask_input": {0: "objects"},
    "has_mask_input": {0: "objects"},
}
"""Dynamic axes of `prompt_inputs`."""


def asked_of(prompts: Prompts, mask_side: int, padded: bool) -> dict[str, Tensor]:
    """Prompts as a mask decoder's graph takes them.

    Args:
        prompts: The prompts.
        mask_side: Side h = w of a mask to start from.
        padded: Whether points without a box end in one labelled −1 that the caller adds.
    """
    count, points, labels = len(prompts), [], []
    if prompts.points is not None and prompts.labels is not None:
        points.append(prompts.points.float())
        labels.append(prompts.labels.long())
    if prompts.boxes is not None:
        points.append(prompts.boxes.float().unflatten(1, (2, 2)))
        labels.append(torch.tensor([[2, 3]]).expand(count, 2))
    elif padded:
        points.append(torch.zeros(count, 1, 2))
        labels.append(torch.full((count, 1), -1))
    start = prompts.masks
    return {
        "image_index": prompts.image_index,
        "point_coords": torch.cat(points, dim=1),
        "point_labels": torch.cat(labels, dim=1),
        "mask_input": torch.zeros(count, 1, mask_side, mask_side) if start is None else start[:, None].float(),
        "has_mask_input": torch.full((count,), float(start is not None)),
    }


def prompt_consumer(runners: Mapping[str, Runner], mask_side: int, padded: bool) -> PromptConsumer:
    """A consumer made of both graphs; see `asked_of`."""

    def logits(image: Tensor, asked: Sequence[Prompts]) -> list[Tensor]:
        features = runners[ENCODER](images=image)
        answers = [runners[DECODER](**features, **asked_of(prompts, mask_side, padded)) for prompts in asked]
        return [answer[MASKS][:, 0] for answer in answers]

    return logits


class SAMGraphs(GraphFamily):
    """SAM's image encoder, and its prompt encoder with its mask decoder."""

    stems = (ENCODER, DECODER)

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__(model)
        self.mask_side = model.mask_side
        side = self.mask_side // 4
        self.notes = (*notes_of(model, f"{EMBEDDINGS} (batch, 256, {side}, {side})"), _PADDED)

    def graphs(self, model: SegmentationModel) -> list[Graph]:
        """The image encoder and the mask decoder."""
        sam = cast(SAMDecoding, model)
        images = torch.rand(IMAGES, 3, self.image_size, self.image_size, generator=torch.Generator().manual_seed(0))
        encoder, decoder = _Encoder(sam).eval(), _Decoder(sam).eval()
        _uncache(encoder)
        with torch.no_grad():
            features = sam.encode(images)
        batch = {0: "batch"}
        return [
            Graph(ENCODER, encoder, {"images": images}, (EMBEDDINGS,), {"images": batch}),
            Graph(
                DECODER,
                decoder,
                {EMBEDDINGS: features, **prompt_inputs(model)},
                (MASKS, SCORES),
                {EMBEDDINGS: batch, **PROMPT_AXES},
            ),
        ]

    def consumer(self, runners: Mapping[str, Runner]) -> PromptConsumer:
        """Image and prompts of any form."""
        return prompt_consumer(runners, self.mask_side, padded=True)


class _Encoder(nn.Module):
    """Images (B, 3, S, S) → features (B, C, g, g)."""

    def __init__(self, model: SAMDecoding) -> None:
        super().__init__()
        whole = copy.copy(model)  # with modules of its own, so that one can be put in another's place
        whole._modules = dict(model._modules)
        self.image_encoder = whole.image_encoder = copy.deepcopy(model.image_encoder)
        self._whole = (whole,)  # in a tuple, so that the decoder's tensors are not registered

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self._whole[0].encode(images),)


class _Decoder(nn.Module):
    """What `SAMDecoding.decode` computes, of prompts in one form for all that may be asked."""

    def __init__(self, model: SAMDecoding) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = model.prompt_encoder, model.mask_decoder
        self._whole = (model,)
        self._side = model.preprocessing.image_size

    def forward(
        self, features: Tensor, image_index: Tensor, points: Tensor, labels: Tensor, masks: Tensor, has_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        positions = self._whole[0]._positions(features.shape[-1])
        without = self.prompt_encoder.no_mask_embed.weight[0, :, None, None]
        shown = has_mask[:, None, None, None] > 0.5
        found: Any = self.mask_decoder(
            image_embeddings=features[image_index],
            image_positional_embeddings=positions.expand(image_index.shape[0], -1, -1, -1),
            sparse_prompt_embeddings=self._embedded(points, labels)[:, None],
            dense_prompt_embeddings=torch.where(shown, self.prompt_encoder.mask_embed(masks), without),
            multimask_output=False,
        )
        return found[0][:, 0], found[1][:, 0]

    def _embedded(self, points: Tensor, labels: Tensor) -> Tensor:
        """Points (Q, P, 2) with labels (Q, P) as tokens (Q, P, C); a box's corners are points labelled 2 and 3."""
        encoder = self.prompt_encoder
        kinds = labels[..., None]
        shares = (points + 0.5) / self._side  # centres of pixels
        tokens = torch.where(kinds == -1, encoder.not_a_point_embed.weight, encoder.shared_embedding(shares))
        for label, embedding in enumerate(encoder.point_embed):
            tokens = torch.where(kinds == label, tokens + embedding.weight, tokens)
        return tokens


def _uncache(encoder: nn.Module) -> None:
    """Let timm's TinyViT compute its attention biases from its parameters, which it else has cached in evaluation."""
    for module in encoder.modules():
        if isinstance(module, Attention):
            module.training = True  # of the layer itself, none of whose parts knows of it
            module.attention_bias_cache = {}
