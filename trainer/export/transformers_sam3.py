"""SAM3 as transformers' Sam3Model.

Shapes: P texts, T tokens of a text, S input side, N object queries, h w side of the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor
from transformers.image_transforms import corners_to_center_format

from trainer.export.base import TextAnswer, TextConsumer
from trainer.export.transformers_family import Family, image_settings, load_strictly, quietly
from trainer.models.sam3_shape import config_of

START, END = "<|startoftext|>", "<|endoftext|>"
NOWHERE = -10
"""Label of a box that is none: Sam3Processor's own padding."""
_EXEMPLARS = (
    "Asked with a text alone, Sam3Model leaves out the token for exemplars that Meta's code always has, and that the "
    "run was trained with: give it a box that is none besides, input_boxes=torch.zeros(1, 1, 4) and "
    "input_boxes_labels=torch.tensor([[-10]]), as the gate does; without it the answers are others."
)
_POINTS = "Projections of point exemplars are left out: Sam3Model has none, and Meta's layout (--to sam3) has them."
_TEXTS = "Longer texts than {context} tokens are to be cut: tokenizer(text, truncation=True); Sam3Processor does not."


class SAM3Family(Family):
    """Sam3Model holds all of SAM3 but for points as exemplars."""

    asks = "texts"

    @property
    def architecture(self) -> type[Sam3Model]:
        """Sam3Model."""
        return Sam3Model

    def config(self) -> Sam3Config:
        """What transformers calls our sizes."""
        return config_of(self.model.shape, self.side, float(self.model.detr_encoder.config.dropout))

    def renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our names are transformers'."""
        return {name: tensor for name, tensor in state.items() if not name.startswith("point_encoder.")}

    def processor(self) -> Sam3Processor:
        """SAM3's processor, with the tokenizer that the run had."""
        pieces = self.model.tokenizer.standalone()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=pieces,
            model_max_length=self.model.shape.context,
            bos_token=START,
            eos_token=END,
            unk_token=END,
            pad_token=pieces.id_to_token(0),
        )
        settings = image_settings(self.model.preprocessing, self.model.mask_side)
        return Sam3Processor(Sam3ImageProcessor(**settings), tokenizer)

    def answering(self, model: Any, folder: Path | None) -> TextConsumer:
        """Ask with texts, by the tokenizer of the folder or, where there is none, by that of the run."""
        if folder is None:
            return _asking(model, self.processor().tokenizer, self.model.shape.context)
        with quietly():
            processor = Sam3Processor.from_pretrained(folder, local_files_only=True)
        return _asking(model, processor.tokenizer, self.model.shape.context)

    def load(self, folder: Path) -> TextConsumer:
        """Load Sam3Model."""
        return self.answering(load_strictly(Sam3Model, folder), folder)

    def notes(self, dtype: str) -> tuple[str, ...]:
        """Also how a text is asked."""
        points = (_POINTS,) if self.model.point_encoder is not None else ()
        return (_EXEMPLARS, *points, _TEXTS.format(context=self.model.shape.context), *super().notes(dtype))


def _asking(model: Any, tokenizer: Any, context: int) -> TextConsumer:
    def answer(image: Tensor, texts: Sequence[str]) -> TextAnswer:
        seen = model.get_vision_features(pixel_values=image)
        none = {"input_boxes": torch.zeros(1, 1, 4), "input_boxes_labels": torch.tensor([[NOWHERE]])}
        found = []
        for text in texts:  # one by one: Sam3Model takes an image's features for one text only
            tokens = tokenizer(text, padding="max_length", max_length=context, truncation=True, return_tensors="pt")
            found.append(model(vision_embeds=seen, **tokens, **none))
        confidence = [one.pred_logits.sigmoid() * one.presence_logits.sigmoid() for one in found]
        boxes = corners_to_center_format(torch.cat([one.pred_boxes for one in found]))
        return TextAnswer(torch.cat(confidence), boxes, torch.cat([one.pred_masks for one in found]))

    return answer
