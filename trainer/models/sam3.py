"""SAM3: concepts named by text, found as sets of instances; composed from the submodules of transformers' Sam3Model.

Shapes: B images, P prompts, K texts, T tokens of a text, N exemplars of a prompt, S input side (1008 in the original),
g its side in patches, Q object queries, C channels of the detector.
Source: Carion et al. 2025, "SAM 3: Segment Anything with Concepts".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align  # type: ignore[import-untyped]
from transformers import Sam3Model

from data_shards.errors import UserError
from trainer.losses.boxes import corners
from trainer.losses.sets import SetPrediction
from trainer.models.base import SegmentationModel
from trainer.models.preprocessing import Preprocessing
from trainer.models.recomputing import Recomputed, recompute_layers, recomputed_kinds
from trainer.models.sam3_decoding import Detection
from trainer.models.sam3_names import to_ours
from trainer.models.sam3_regularisation import regularise, start_as_official
from trainer.models.sam3_shape import VOCABULARY, SAM3Shape, check_sizes, config_of
from trainer.models.tokenizer import TextTokenizer, make_tokenizer
from trainer.models.weights import load_strictly, read_weights, source_of
from trainer.prompts.base import bucket_of
from trainer.prompts.concepts import ConceptPrompts


@dataclass(frozen=True)
class SAM3Features:
    """Encoded images.

    Attributes:
        levels: (B, C, 4g, 4g), (B, C, 2g, 2g) and (B, C, g, g).
    """

    levels: tuple[Tensor, ...]


class SAM3(SegmentationModel):
    """SAM3's image detector, to be asked by text, with boxes (and points) as exemplars if wanted.

    Args:
        shape: Sizes, key by key; the released model's where they are left out.
        image_size: Input side S in pixels, a multiple of the patch; the released weights were trained at 1008.
        weights: A hub name (``facebook/sam3``), a folder that transformers wrote, or Meta's ``.pt`` with or without the
            prefix ``detector.``; null is random.
        weights_sha256: What the weights file must hash to, in hexadecimal; optional.
        tokenizer: Folder with the tokenizer, or the file ``bpe_simple_vocab_16e6.txt.gz``; null looks beside the
            weights, then into the installed package ``open-clip-torch``.
        dropout: Share of attention weights and FFN units that drop out in training; 0.1 in the official training.
        drop_path: Share of the deepest image block's branches that drop out in training; 0.1 in the official training.
        attention: ``eager`` or ``sdpa`` in the encoders of image and text; null is sdpa.
        checkpoint_activations: Compute each layer of ViT, text encoder and detector a second time in the backward pass
            instead of keeping what is in it: about a seventh of the memory, about a third more time. Or a list of some
            of ``vision_encoder``, ``text_encoder``, ``detector``.
        points: Whether points can be exemplars. Only Meta's own layout has the weights for them.
    """

    # Sam3Model's own parts
    vision_encoder: Any
    text_encoder: Any
    text_projection: nn.Linear
    geometry_encoder: Any
    detr_encoder: Any
    detr_decoder: Any
    mask_decoder: Any
    dot_product_scoring: Any

    score_head = "dot_product_scoring"
    encoder = "vision_encoder"
    decodes_whole = False
    # where the official code's layer decay counts from 0, the norm before the first block among them
    patch_embedding = ("vision_encoder.backbone.embeddings", "vision_encoder.backbone.layer_norm")

    def __init__(
        self,
        shape: SAM3Shape | None = None,
        image_size: int = 1008,
        weights: str | None = "facebook/sam3",
        weights_sha256: str | None = None,
        tokenizer: str | None = None,
        dropout: float = 0.1,
        drop_path: float = 0.1,
        attention: Literal["eager", "sdpa"] | None = None,
        checkpoint_activations: Recomputed = False,
        points: bool = False,
    ) -> None:
        super().__init__()
        self.shape = shape or SAM3Shape()
        check_sizes(self.shape, image_size, dropout, drop_path)
        source = source_of(weights)
        self._arguments: dict[str, Any] = {
            "tokenizer": tokenizer,
            "dropout": dropout,
            "drop_path": drop_path,
            "attention": attention,
            "checkpoint_activations": checkpoint_activations,
            "points": points,
        }
        self.preprocessing = Preprocessing(image_size, resize="squash", scaling="centred")
        recomputed = recomputed_kinds(checkpoint_activations, ["vision_encoder", "text_encoder", "detector"])
        self.recompute_detector = "detector" in recomputed
        for name, part in Sam3Model(config_of(self.shape, image_size, dropout, attention)).named_children():
            self.add_module(name, part)
        self.point_encoder = _point_encoder(self.shape.hidden) if points else None
        start_as_official(self)
        regularise(self, dropout, drop_path, image_size // self.shape.patch)
        for kind in recomputed - {"detector"}:
            recompute_layers(self.get_submodule(kind))
        self.fixed = _fixed(self)
        for name in self.fixed:
            self.get_parameter(name).requires_grad_(False)
        self.source: str | None = source  # of the weights; a tracker may lie beside them
        self._tokenizer: TextTokenizer | None = None
        if source is not None:
            self.load(read_weights(source, weights_sha256), source)
        self.train()

    @property
    def mask_side(self) -> int:
        """Four times the input's side in patches."""
        return 4 * (self.preprocessing.image_size // self.shape.patch)

    def block_kinds(self) -> dict[str, list[nn.Module]]:
        """ViT, text encoder and DETR encoder; a decoder's layers are not called as modules."""
        text = list(self.text_encoder.text_model.encoder.layers)
        return {**super().block_kinds(), "text_encoder": text, "detr_encoder": list(self.detr_encoder.layers)}

    @property
    def tokenizer(self) -> TextTokenizer:
        """What makes tokens of texts; read when it is first needed.

        Raises:
            UserError: There is none beside the weights, nor in an installed package.
        """
        if self._tokenizer is None:
            found = make_tokenizer(self._arguments["tokenizer"], self.source, self.shape.context)
            if found.vocabulary > VOCABULARY:
                raise UserError(f"tokenizer: it has {found.vocabulary:,} tokens, SAM3's text encoder {VOCABULARY:,}")
            self._tokenizer = found
        return self._tokenizer

    def encode(self, images: Tensor) -> SAM3Features:
        """Encode images (B, 3, S, S)."""
        tokens = self.vision_encoder.backbone(images).last_hidden_state
        side = images.shape[-1] // self.shape.patch
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))
        # the last level, half as fine, is for the tracker: the detector never looks at it
        return SAM3Features(tuple(layer(grid) for layer in self.vision_encoder.neck.fpn_layers[:-1]))

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode K texts: features (K, T, C), and (K, T) bool, which of the tokens are text and no padding."""
        device = next(self.text_projection.parameters()).device
        tokens, valid = (tensor.to(device, non_blocking=True) for tensor in self.tokenizer(texts))
        return self.read_tokens(tokens, valid), valid

    def read_tokens(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Encode K texts' tokens (K, T) int64, of which those are text where `valid` is true: features (K, T, C)."""
        hidden = self.text_encoder(input_ids=tokens, attention_mask=valid.long()).last_hidden_state
        features: Tensor = self.text_projection(hidden)
        return features

    def detect(self, features: SAM3Features, prompts: ConceptPrompts, buckets: bool = False) -> SetPrediction:
        """Look for concepts: each text is read once, however many images it is asked about.

        In training every decoder layer answers, and the one-to-many half; else the last layer alone.

        Args:
            features: Encoded images.
            prompts: The prompts.
            buckets: Pad texts and prompts to few numbers (`bucket_of`); what was padded is left out of the answer.

        Raises:
            UserError: Points are asked with, and the model was made without them.
        """
        texts = list(dict.fromkeys(prompts.texts))
        asked = prompts.padded() if buckets else prompts
        place = torch.tensor([texts.index(text) for text in asked.texts])
        known, valid = self.read(texts + texts[:1] * (bucket_of(len(texts)) - len(texts) if buckets else 0))
        found = self.detect_tokens(features, known, valid, place, asked)
        return found if len(asked) == len(prompts) else found.first(len(prompts))

    def detect_tokens(
        self, features: SAM3Features, known: Tensor, valid: Tensor, place: Tensor, prompts: ConceptPrompts
    ) -> SetPrediction:
        """Look for concepts whose texts have been read.

        Args:
            features: Encoded images.
            known: (K, T, C) encoded texts.
            valid: (K, T) bool.
            place: (P,) which of the texts each prompt has.
            prompts: The prompts.
        """
        device = known.device
        prompts, place = prompts.to(device), place.to(device, non_blocking=True)
        positions = self._positions(features.levels[-1])
        shown, shown_valid = self._geometry(features.levels[-1], positions, prompts)
        prompt = torch.cat([known[place].to(shown.dtype), shown], dim=1)
        mask = torch.cat([valid[place], shown_valid], dim=1)
        detection = Detection(self, self.training and self.recompute_detector)
        return detection.run(features.levels, positions, prompts.image_index, prompt, mask)

    def decode(self, features: Any, prompts: Any) -> tuple[Tensor, Tensor]:
        """The most confident instance of each concept: mask logits (P, 1, 4g, 4g) and confidences (P, 1)."""
        found = self.detect(features, prompts)
        assert found.masks is not None
        confidence, best = found.confidence.max(dim=1)
        masks = [found.masks.of(prompt, best[prompt : prompt + 1]) for prompt in range(len(prompts))]
        return torch.stack(masks), confidence[:, None]

    def load(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load weights in any of the layouts.

        Raises:
            UserError: Not every key that the model has was there, or one that it has not.
        """
        ours = to_ours(state)
        points = {name for name in ours if name.startswith("point_encoder.")}
        if self.point_encoder is None:
            ours = {name: tensor for name, tensor in ours.items() if name not in points}
        elif not points:
            raise UserError(
                f"weights {source}: they have nothing for points, which only Meta's own layout has: set points to false"
            )
        load_strictly(self, ours, source, named=40)

    def at_size(self, image_size: int) -> SAM3:
        """A copy for another input side; its positions are tiled and scaled, as in the original."""
        copy = SAM3(self.shape, image_size, weights=None, **self._arguments)
        copy.load_state_dict(self.state_dict())
        copy.source, copy._tokenizer = self.source, self._tokenizer
        return copy.to(next(self.parameters()).device).train(self.training)  # type: ignore[return-value]

    def _positions(self, coarse: Tensor) -> Tensor:
        """Positional encoding (1, g², C) of the coarsest features; in fp32, since bf16 cannot tell places apart."""
        # place by place: what the encoding makes of a whole map it keeps for ever, were it made in inference mode or of
        # fake tensors, and gives that to a training
        side = coarse.shape[-1]
        ticks = torch.arange(1, side + 1, device=coarse.device, dtype=torch.float32) / (side + 1e-6)
        across, down = self.vision_encoder.neck.position_encoding.encode_1d_positions(ticks, ticks)
        rows, columns = down[:, None].expand(-1, side, -1), across[None].expand(side, -1, -1)
        flat = torch.cat([rows, columns], dim=-1).flatten(0, 1)[None]
        return flat.to(coarse.dtype)

    def _geometry(self, coarse: Tensor, positions: Tensor, prompts: ConceptPrompts) -> tuple[Tensor, Tensor]:
        """Encode exemplars and the CLS token, which the official model has even where there is no exemplar.

        Returns:
            (P, N + 1, C), and which of them are valid, (P, N + 1) bool.
        """
        encoder = self.geometry_encoder
        count, device = len(prompts), coarse.device
        image = coarse[prompts.image_index]
        normed = encoder.vision_layer_norm(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        boxes = prompts.boxes if prompts.boxes is not None else torch.zeros(count, 0, 4, device=device)
        kinds: list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor | None]] = []
        if prompts.points is not None:
            kinds.append((self._points, prompts.points, prompts.point_labels))
        kinds.append((self._boxes, boxes, prompts.box_labels))
        parts, signs = [], []
        with torch.autocast(device.type, enabled=False):  # bf16 would round coordinates to some two pixels
            for encode, places, given in kinds:
                labels = torch.ones(places.shape[:2], dtype=torch.int64, device=device) if given is None else given
                parts.append(encode(normed.float(), places) + encoder.label_embed(labels.clamp(min=0)))
                signs.append(labels >= 0)
        embedded, valid = torch.cat(parts, dim=1), torch.cat(signs, dim=1)
        token = encoder.cls_embed.weight.expand(count, 1, -1).to(embedded.dtype)
        shown = torch.cat([embedded, token], dim=1)
        valid = F.pad(valid, (0, 1), value=True)
        return self._look(image, positions, shown, valid), valid

    def _look(self, image: Tensor, positions: Tensor, shown: Tensor, valid: Tensor) -> Tensor:
        """Let exemplars and the CLS token (P, N + 1, C) look at each other and at their image (P, C, g, g)."""
        encoder = self.geometry_encoder
        shown = encoder.prompt_layer_norm(encoder.final_proj(shown))
        flat = image.flatten(2).transpose(1, 2)
        for layer in encoder.layers:
            shown = layer(shown, flat, positions, valid[:, None, None, :])
        looked: Tensor = encoder.output_layer_norm(shown)
        return looked

    def _boxes(self, normed: Tensor, boxes: Tensor) -> Tensor:
        """Encode box exemplars (P, N, 4), as transformers does, which waits for the device to learn the map's side."""
        encoder, side = self.geometry_encoder, normed.shape[-1]
        edges = side * torch.stack(corners(boxes), dim=-1)
        there = roi_align(normed, list(edges.unbind(0)), encoder.roi_size)
        pooled = encoder.boxes_pool_project(there).flatten(1).unflatten(0, boxes.shape[:2])
        place = encoder._encode_box_coordinates(*boxes.flatten(0, 1).unbind(-1)).unflatten(0, boxes.shape[:2])
        embedded: Tensor = encoder.boxes_direct_project(boxes) + pooled + encoder.boxes_pos_enc_project(place)
        return embedded

    def _points(self, normed: Tensor, points: Tensor) -> Tensor:
        """Encode point exemplars (P, N, 2), as Meta's code does: where they are, what is there, and their position."""
        if self.point_encoder is None:
            raise UserError("model.init_args.points is false: set it to true to ask with points, and load Meta's .pt")
        encoder = self.geometry_encoder
        there = F.grid_sample(normed, (2 * points - 1)[:, :, None], align_corners=False)[..., 0]
        across, down = encoder.position_encoding.encode_1d_positions(points[..., 0].flatten(), points[..., 1].flatten())
        place = torch.cat([across, down], dim=-1).unflatten(0, points.shape[:2])
        parts = {"direct": points, "pool": there.transpose(1, 2), "position": place}
        return torch.stack([self.point_encoder[name](part) for name, part in parts.items()]).sum(0)


def _point_encoder(width: int) -> nn.ModuleDict:
    """Meta's projections of point exemplars, which transformers left out."""
    return nn.ModuleDict(
        {"direct": nn.Linear(2, width), "pool": nn.Linear(width, width), "position": nn.Linear(width, width)}
    )


def _fixed(model: SAM3) -> tuple[str, ...]:
    """Parameters that no output depends on: they never learn, and ranks must not wait for their gradients."""
    levels, stages = len(model.vision_encoder.neck.fpn_layers), len(model.mask_decoder.pixel_decoder.norms)
    unused = (
        f"vision_encoder.neck.fpn_layers.{levels - 1}",
        "text_encoder.text_projection",
        f"mask_decoder.pixel_decoder.conv_layers.{stages - 1}",
        f"mask_decoder.pixel_decoder.norms.{stages - 1}",
    )
    return tuple(name for name, _ in model.named_parameters() if name.startswith(tuple(part + "." for part in unused)))
