"""SAM3 as three graphs: of the image, of the texts, and of the detector that finds what a text names in an image.

Shapes: B images, K texts, P prompts (each one text about one image), T tokens of a text, S input side, C channels, g
side of the coarsest features in patches, N object queries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from trainer.export.base import TextAnswer, TextConsumer
from trainer.export.graphs import Graph, GraphFamily, Runner
from trainer.losses.sets import FactoredMasks
from trainer.models import SAM3, SegmentationModel
from trainer.models.sam3 import SAM3Features
from trainer.prompts.concepts import ConceptPrompts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
"""Makes tokens of texts, with the library ``tokenizers`` of any language."""
TOKENS = "tokens.json"
"""The same in words and examples, for those that make tokens by other means."""
_LEVELS = ("fine", "middle", "coarse")
_EXAMPLES = ("liver", "left kidney", "T2-weighted lesion", "Crohn's disease")
_NOTES = (
    "image_encoder takes images (B, 3, S, S) as FILE.preprocessing.json says and gives features fine, middle and "
    "coarse; text_encoder takes input_ids and attention_mask (K, T) and gives text (K, T, C); decoder takes the "
    "features, image_index (P,), which image each prompt is about, and of each prompt text (P, T, C) and "
    "attention_mask (P, T).",
    "decoder gives of each prompt and query confidence (P, N), that of the query times that of the text being there "
    "at all, which is also given as presence (P,); boxes (P, N, 4) as (cx, cy, w, h) in shares of the side; mask "
    "logits (P, N, 4g, 4g); and semantic (P, 4g, 4g), logits of all instances in one mask.",
    f"{TOKENIZER} makes input_ids and attention_mask of texts with the library tokenizers, cut off and padded; "
    f"{TOKENS} says how, with examples. It does not undo HTML entities.",
    "The graphs are asked with texts alone: exemplars (boxes, points) are not in them.",
)


class SAM3Graphs(GraphFamily):
    """Image encoder, text encoder and detector; the consumer makes tokens with the file that is written beside them."""

    asks = "texts"
    stems = ("image_encoder", "text_encoder", "decoder")
    notes = _NOTES
    _tokenizer: Tokenizer

    def graphs(self, model: SegmentationModel) -> list[Graph]:
        """Cut a SAM3 into its three graphs."""
        sam3 = cast("SAM3", model)
        images, texts, prompts = 2, 3, 5  # of different lengths, so that none passes for another
        side, context = self.image_size // sam3.shape.patch, sam3.shape.context
        width = sam3.shape.hidden
        masks = torch.ones(prompts, context, dtype=torch.int64)
        masks[0, 3:] = 0
        ids = torch.ones(texts, context, dtype=torch.int64)
        levels = {
            name: torch.zeros(images, width, times * side, times * side)
            for name, times in zip(_LEVELS, (4, 2, 1), strict=True)
        }
        asked = {
            "image_index": torch.arange(prompts) % images,
            "text": torch.zeros(prompts, context, width),
            "attention_mask": masks,
        }
        return [
            Graph(
                stem="image_encoder",
                module=_Image(sam3),
                inputs={"images": torch.zeros(images, 3, self.image_size, self.image_size)},
                outputs=_LEVELS,
                axes={"images": {0: "images"}},
            ),
            Graph(
                stem="text_encoder",
                module=_Text(sam3),
                inputs={"input_ids": ids, "attention_mask": masks[:texts]},
                outputs=("text",),
                axes={name: {0: "texts"} for name in ("input_ids", "attention_mask")},
            ),
            Graph(
                stem="decoder",
                module=_Detector(sam3),
                inputs={**levels, **asked},
                outputs=("confidence", "presence", "boxes", "masks", "semantic"),
                axes={**{name: {0: "images"} for name in levels}, **{name: {0: "prompts"} for name in asked}},
            ),
        ]

    def write_beside(self, model: SegmentationModel, path: Path) -> None:
        """Write the tokenizer, and what to know of tokens without it."""
        tokenizer = cast("SAM3", model).tokenizer
        made = tokenizer.standalone()
        made.save(str(path / TOKENIZER))
        examples = {text: tokenizer.encode(text) for text in _EXAMPLES}
        first = examples[_EXAMPLES[0]]
        said = {
            "merges": "CLIP's: bpe_simple_vocab_16e6.txt.gz, of which the first 48,894 count",
            "text": "in lower case, with straight quotes, without control characters",
            "context": tokenizer.context,
            "start": first[0],
            "end": first[-1],
            "padding": 0,
            "vocabulary": tokenizer.vocabulary,
            "attention_mask": "1 from the start to the end, 0 on padding",
            "too_long": "cut off before the last place, which the end takes",
            "examples": examples,
        }
        (path / TOKENS).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")

    def read_beside(self, path: Path) -> None:
        """Read the tokenizer, as a user of the graphs would."""
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path / TOKENIZER))

    def consumer(self, runners: Mapping[str, Runner]) -> TextConsumer:
        """Ask the graphs: the image is encoded once, the texts together, and each is looked for by itself.

        Args:
            runners: The loaded graphs by stem.
        """
        image_encoder, text_encoder, decoder = (runners[stem] for stem in self.stems)

        def answer(image: Tensor, texts: Sequence[str]) -> TextAnswer:
            read = [self._tokenizer.encode(text) for text in texts]
            ids = torch.tensor([one.ids for one in read])
            mask = torch.tensor([one.attention_mask for one in read])
            levels = image_encoder(images=image)
            known = text_encoder(input_ids=ids, attention_mask=mask)["text"]
            first = torch.zeros(1, dtype=torch.int64)
            found = [  # one by one: each takes as much memory as the image
                decoder(**levels, image_index=first, text=known[p : p + 1], attention_mask=mask[p : p + 1])
                for p in range(len(texts))
            ]
            confidence, boxes, masks = (torch.cat([one[name] for one in found]) for name in TextAnswer.__annotations__)
            return TextAnswer(confidence, boxes, masks)

        return answer


class _Part(SAM3):
    """Some of a SAM3's parts under their names, with its methods; what no output depends on comes along.

    Args:
        model: The model; the parts are its own, and not copied.
        parts: Names of the parts.
    """

    def __init__(self, model: SAM3, *parts: str) -> None:
        nn.Module.__init__(self)  # SAM3's own would make a whole model
        self.shape = model.shape
        for name in parts:
            holder: nn.Module = self
            *above, last = name.split(".")
            for step in above:
                if step not in holder._modules:
                    holder.add_module(step, nn.Module())
                holder = holder.get_submodule(step)
            holder.add_module(last, model.get_submodule(name))
        self.eval()


class _Image(_Part):
    """Images (B, 3, S, S) → features (B, C, 4g, 4g), (B, C, 2g, 2g) and (B, C, g, g)."""

    def __init__(self, model: SAM3) -> None:
        super().__init__(model, "vision_encoder.backbone", "vision_encoder.neck.fpn_layers")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Encode images."""
        return self.encode(images).levels


class _Text(_Part):
    """Tokens and which of them are text, (K, T) int64 each → features (K, T, C)."""

    def __init__(self, model: SAM3) -> None:
        super().__init__(model, "text_encoder", "text_projection")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """Encode texts."""
        return (self.read_tokens(input_ids, attention_mask),)


class _Detector(_Part):
    """Features of images and of texts → what is found."""

    def __init__(self, model: SAM3) -> None:
        of_the_token = ("cls_embed", "final_proj", "prompt_layer_norm", "layers", "output_layer_norm")
        super().__init__(
            model,
            "vision_encoder.neck.position_encoding",
            *(f"geometry_encoder.{part}" for part in of_the_token),
            "detr_encoder",
            "detr_decoder",
            "mask_decoder",
            "dot_product_scoring",
        )

    def forward(
        self, fine: Tensor, middle: Tensor, coarse: Tensor, image_index: Tensor, text: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, ...]:
        """Look for each text in its image.

        Args:
            fine: (B, C, 4g, 4g).
            middle: (B, C, 2g, 2g).
            coarse: (B, C, g, g).
            image_index: (P,) int64.
            text: (P, T, C).
            attention_mask: (P, T) int64.

        Returns:
            Confidences (P, N), those of presence (P,), boxes (P, N, 4), mask logits (P, N, 4g, 4g) and logits of all in
            one mask (P, 4g, 4g).
        """
        prompts = ConceptPrompts(image_index, ())
        place = torch.arange(text.shape[0], device=text.device)
        found = self.detect_tokens(SAM3Features((fine, middle, coarse)), text, attention_mask.bool(), place, prompts)
        assert isinstance(found.masks, FactoredMasks) and found.presence is not None and found.semantic is not None
        masks = torch.einsum("pnc,pchw->pnhw", found.masks.queries, found.masks.pixels)
        masks = masks + found.masks.offsets[..., None, None]
        return found.confidence, found.presence[-1].sigmoid(), found.boxes[-1], masks, found.semantic

    def _geometry(self, coarse: Tensor, positions: Tensor, prompts: ConceptPrompts) -> tuple[Tensor, Tensor]:
        """The CLS token alone, which stands where exemplars would."""
        image = coarse[prompts.image_index]
        token = self.geometry_encoder.cls_embed.weight.expand(image.shape[0], 1, -1)
        valid = torch.ones(image.shape[0], 1, dtype=torch.bool, device=image.device)
        return self._look(image, positions, token, valid), valid
