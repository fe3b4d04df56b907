"""SAM2: Hiera, a memory of frames, SAM's prompt encoder and mask decoder, from the package `sam2`.

Shapes: B images, Q objects (prompts), M masks an object, S input side, g = S/16 side of the features, h w = S/4 side of
the masks, C = 256 channels of the features, D = 64 channels of a memory.
Source: Ravi et al. 2024 (arXiv:2408.00714); SAM 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.modeling.sam2_base import SAM2Base
from sam2.modeling.sam2_utils import get_1d_sine_pe
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel
from trainer.models.preprocessing import Preprocessing
from trainer.models.recomputing import Recomputed, recompute_blocks, recomputed_kinds
from trainer.models.sam2_memory import Memory, MemoryPolicy, RecentMemory
from trainer.models.sam2_parts import composition, image_encoder, memory_attention, memory_encoder
from trainer.models.sam2_shape import STRIDE, SAM2Shape, Variant, check_sizes, shape_of
from trainer.models.weights import load_strictly, read_weights, source_of
from trainer.prompts import Prompts

ORIGINAL_SIZE = 1024
"""Input side that the released weights were trained at, in pixels."""
PRESENT = 3.0
"""Logit of an object's being there that random weights begin with."""
SUREST = 32.0
"""Largest logit of a mask that is given back as a prompt."""


@dataclass(frozen=True)
class SAM2Features:
    """What an image is encoded to.

    Attributes:
        top: (B, C, g, g).
        high: (B, C/8, 4 g, 4 g) and (B, C/4, 2 g, 2 g), for the mask decoder.
        positions: (1, C, g, g) where `top` is.
    """

    top: Tensor
    high: tuple[Tensor, Tensor]
    positions: Tensor

    def take(self, index: Tensor) -> SAM2Features:
        """The features of some images, such as one for each object; index (Q,) int64."""
        index = index.to(self.top.device, non_blocking=True)
        return SAM2Features(self.top[index], (self.high[0][index], self.high[1][index]), self.positions)


@dataclass(frozen=True)
class Look:
    """What the decoder says of a frame.

    Attributes:
        logits: (Q, M, h, w) mask logits; M is 3 where the prompt may mean several things, else 1. −1024 throughout
            where the object is held to be absent.
        ious: (Q, M) IoU that each mask is predicted to have.
        presence: (Q,) logits of the object's being there.
        best: (Q, h, w) the mask that is predicted to be best.
        full: (Q, S, S) the same at the input's side; what the memory is made of.
        pointer: (Q, C) token of the object, for later frames.
    """

    logits: Tensor
    ious: Tensor
    presence: Tensor
    best: Tensor
    full: Tensor
    pointer: Tensor


class SAM2(SegmentationModel, SAM2Base):
    """SAM 2.1: tiny (38.9 M parameters), small (46.0 M), base+ (80.8 M) and large (224.4 M).

    As a promptable model of single images it is asked by `encode` and `decode`, and answers as SAM2ImagePredictor does;
    through frames it is led by `trainer.models.sam2_tracking.Tracking`, which answers as SAM2VideoPredictor does.
    Parameters have the names of the original ``.pt``. Needs the package ``sam2``.

    Args:
        variant: ``tiny``, ``small``, ``base_plus``, ``large``, or another shape, key by key.
        image_size: Input side S in pixels, a multiple of 32. The released weights were trained at 1024, MedSAM2 at 512;
            no weight depends on it.
        weights: A hub name (``facebook/sam2.1-hiera-tiny``), the original ``.pt``, or what transformers wrote; null is
            random, and objects are held to be there at first: absent ones would teach no masks.
        weights_sha256: What the weights file must hash to, in hexadecimal; optional.
        scaling: How an image is scaled: ``mean_std`` is Meta's, ``zscore`` takes each image's own mean and deviation.
        memory: Which memories a frame is told; those of the frames just before by default, as in SAM2.
        postprocessing: In evaluation, as SAM2's predictors by default: a mask that is not stable gives way to the best
            of three, and what is remembered of a prompted frame is its mask without halftones.
        dropout: Share of the memory attention that drops out in training.
        drop_path: Share of the deepest Hiera block's residuals that drop out in training; 0.1 in SAM 2.1's training.
        checkpoint_activations: Compute each block a second time in the backward pass instead of keeping what is in it:
            much less memory, about a third more time. Or a list of ``image_encoder``, ``memory_attention``.
    """

    score_head = "sam_mask_decoder.iou_prediction_head"
    patch_embedding = (
        "image_encoder.trunk.patch_embed",
        "image_encoder.trunk.pos_embed",
        "image_encoder.trunk.pos_embed_window",
    )
    also_called: ClassVar = {"prompt_encoder": "sam_prompt_encoder", "mask_decoder": "sam_mask_decoder"}
    fixed = ("no_mem_pos_enc",)

    if TYPE_CHECKING:  # sam2 says nothing of its types

        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self,
        variant: Variant | SAM2Shape = "tiny",
        image_size: int = ORIGINAL_SIZE,
        weights: str | None = "facebook/sam2.1-hiera-tiny",
        weights_sha256: str | None = None,
        scaling: Literal["mean_std", "zscore"] = "mean_std",
        memory: MemoryPolicy | None = None,
        postprocessing: bool = True,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        checkpoint_activations: Recomputed = False,
    ) -> None:
        shape = shape_of(variant)
        check_sizes(shape, image_size)
        for name, share in (("dropout", dropout), ("drop_path", drop_path)):
            if not 0 <= share < 1:
                raise UserError(f"{name} is a share in [0, 1), not {share}")
        place = torch.get_default_device()
        # some parts ask for values while they are made, and move themselves to a first GPU that may be another rank's
        with torch.device("cpu"), mock.patch("torch.cuda.is_available", return_value=False):
            parts = image_encoder(shape, drop_path), memory_attention(shape, image_size, dropout)
            SAM2Base.__init__(self, *parts, memory_encoder(shape), **composition(shape, image_size, postprocessing))
            nn.init.constant_(self.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, PRESENT)
        self.no_mem_pos_enc.requires_grad_(False)
        self.shape, self.memory = shape, memory or RecentMemory()
        self.preprocessing = Preprocessing(image_size, resize="squash", scaling=scaling)
        self._arguments: dict[str, Any] = {
            "scaling": scaling, "memory": self.memory, "postprocessing": postprocessing, "dropout": dropout,
            "drop_path": drop_path, "checkpoint_activations": checkpoint_activations,
        }  # fmt: skip
        recomputable = {
            "image_encoder": self.image_encoder.trunk.blocks,
            "memory_attention": self.memory_attention.layers,
        }
        for kind in recomputed_kinds(checkpoint_activations, list(recomputable)):
            recompute_blocks(recomputable[kind])
        if place.type != "cpu":
            self.to(place)
        if (source := source_of(weights)) is not None:
            self.load(read_weights(source, weights_sha256), source)
        self.train()

    @property
    def mask_side(self) -> int:
        """Side h = w of the masks."""
        return self.preprocessing.image_size // 4

    def encode(self, images: Tensor) -> SAM2Features:
        """Encode images (B, 3, S, S)."""
        found = self.forward_image(images)
        high, middle, top = found["backbone_fpn"]
        return SAM2Features(top, (high, middle), found["vision_pos_enc"][-1][:1])

    def decode(self, features: SAM2Features, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Answer prompts of one form about single images, without a memory, as SAM2ImagePredictor does.

        Returns:
            Mask logits (Q, 1, h, w) and predicted IoU (Q, 1).
        """
        mine = features.take(prompts.image_index)
        return self._plain_heads(mine, self.without_memory(mine), prompts)

    def glance(self, features: SAM2Features, conditioned: Tensor, prompts: Prompts) -> Look:
        """Answer prompts of one form as `decode` does: one mask, and no word on whether the object is there.

        Args:
            features: One row for each object.
            conditioned: (Q, C, g, g) the features without a memory.
            prompts: The prompts, rows in the order of the objects.
        """
        logits, ious = self._plain_heads(features, conditioned, prompts)
        surely = torch.full_like(ious[:, 0], SUREST)
        return Look(logits, ious, surely, logits[:, 0], logits[:, 0], features.top.mean((2, 3)))

    def _plain_heads(self, mine: SAM2Features, conditioned: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Mask logits (Q, 1, h, w) and predicted IoU (Q, 1), as SAM2ImagePredictor's."""
        masks = prompts.masks
        sparse, dense = self.sam_prompt_encoder(
            points=_as_points(prompts), boxes=None, masks=None if masks is None else masks[:, None]
        )
        logits, ious, _, _ = self.sam_mask_decoder(
            image_embeddings=conditioned,
            image_pe=self.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            repeat_image=False,
            high_res_features=list(mine.high),
        )
        return logits, ious

    def without_memory(self, features: SAM2Features) -> Tensor:
        """Features (Q, C, g, g) of frames that nothing is remembered for."""
        return features.top + self.no_mem_embed[0, 0, :, None, None]

    def look(self, features: SAM2Features, conditioned: Tensor, prompts: Prompts | None) -> Look:
        """Answer prompts of one form, or none, about frames of which something may be remembered.

        Args:
            features: One row for each object.
            conditioned: (Q, C, g, g) the features as they are with what is remembered.
            prompts: The prompts, rows in the order of the objects.
        """
        if prompts is not None and prompts.given is not None:
            found = self._use_mask_as_output(features.top, list(features.high), prompts.given[:, None])
            if not self.training:  # as in the predictor, which keeps the small mask and enlarges it again
                found = (*found[:4], self._enlarged(found[3]), *found[5:])
        else:
            points = None if prompts is None else _as_points(prompts)
            asked = None if points is None else {"point_coords": points[0], "point_labels": points[1]}
            masks = None if prompts is None or prompts.masks is None else prompts.masks[:, None]
            found = self._forward_sam_heads(
                backbone_features=conditioned,
                point_inputs=asked,
                mask_inputs=None if masks is None else masks.clamp(-SUREST, SUREST),
                high_res_features=list(features.high),
                multimask_output=self._use_multimask(True, asked),
            )
        logits, _, ious, best, full, pointer, presence = found
        return Look(logits, ious, presence[:, 0], best[:, 0], full[:, 0], pointer)

    def remember(self, frame: int, features: SAM2Features, look: Look, prompted: bool) -> Memory:
        """Make a memory of a frame with its masks."""
        encoded, positions = self._encode_new_memory(
            current_vision_feats=[_flat(features.top)],
            feat_sizes=[features.top.shape[-2:]],
            pred_masks_high_res=look.full[:, None],
            object_score_logits=look.presence[:, None],
            is_mask_from_pts=prompted,
        )
        # the predictor keeps memories in bf16
        kept = encoded if self.training else encoded.to(torch.bfloat16)
        iou, embedding = look.ious.amax(1), features.top.mean((2, 3))
        return Memory(frame, kept, positions[-1][:1], look.pointer, look.presence, iou, embedding, prompted)

    def recall(
        self,
        features: SAM2Features,
        memories: Sequence[tuple[int, Memory]],
        pointers: Sequence[tuple[int, Memory]],
        frames: int,
    ) -> Tensor:
        """Condition a frame's features on memories: (Q, C, g, g).

        Args:
            features: One row for each object.
            memories: Whose features to attend to, each with its place in time, from 0.
            pointers: Whose object pointers, each with how many frames ago it was.
            frames: Number of frames of the whole.
        """
        keys, places = [], []
        for place, memory in memories:
            # under autocast not every mixture of types can be joined
            keys.append(_flat(memory.features).to(features.top.dtype))
            where = _flat(memory.positions.expand_as(memory.features))
            places.append(where + self.maskmem_tpos_enc[self.num_maskmem - place - 1])
        tokens = 0
        if pointers:
            each, when = self._pointer_tokens(pointers, frames)
            keys.append(each.to(features.top.dtype))
            places.append(when)
            tokens = len(each)
        current = features.top.expand(memories[0][1].features.shape[0], -1, -1, -1)
        found = self.memory_attention(
            curr=[_flat(current)],
            curr_pos=[_flat(features.positions.expand_as(current))],
            memory=torch.cat(keys),
            memory_pos=torch.cat(places),
            num_obj_ptr_tokens=tokens,
        )
        conditioned: Tensor = found.permute(1, 2, 0).reshape(current.shape)
        return conditioned

    def _pointer_tokens(self, pointers: Sequence[tuple[int, Memory]], frames: int) -> tuple[Tensor, Tensor]:
        """Object pointers cut into tokens of a memory's width, (N, Q, D), and where they are in time."""
        each = torch.stack([memory.pointer for _, memory in pointers])  # (P, Q, C)
        pieces = each.shape[-1] // self.mem_dim
        tokens = each.unflatten(-1, (pieces, self.mem_dim)).permute(0, 2, 1, 3).flatten(0, 1)
        ago = torch.tensor([ago for ago, _ in pointers], dtype=torch.float32).to(each.device, non_blocking=True)
        when = get_1d_sine_pe(ago / (min(frames, self.max_obj_ptrs_in_encoder) - 1), dim=self.hidden_dim)
        places = self.obj_ptr_tpos_proj(when)[:, None].expand(-1, each.shape[1], -1)
        return tokens, places.repeat_interleave(pieces, dim=0)

    def _enlarged(self, logits: Tensor) -> Tensor:
        side = self.preprocessing.image_size
        return F.interpolate(logits.float(), (side, side), mode="bilinear", align_corners=False)

    def load(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load weights in any of the layouts, for any input side.

        Args:
            state: Tensors by name, in the original, transformers' or our own layout.
            source: Where they came from, for messages.

        Raises:
            UserError: They are of another architecture, or not all there.
        """
        from trainer.models.sam2_names import check_architecture, to_ours

        ours = to_ours(state, source)
        check_architecture(ours, self.shape, source)
        load_strictly(self, ours, source)

    def at_size(self, image_size: int) -> SAM2:
        """A copy for another input side, with the same weights."""
        with torch.inference_mode(False):  # what is made there could never learn
            copy = SAM2(self.shape, image_size, weights=None, **self._arguments)
            copy.load_state_dict(self.state_dict())
            return copy.to(next(self.parameters()).device).train(self.training)  # type: ignore[return-value]

    def _apply(self, fn: Any, recurse: bool = True) -> SAM2:
        """Move, with what sam2 keeps in plain attributes.

        It would move them itself, but within an evaluation: as tensors of inference mode, no training could use them.
        """
        super()._apply(fn, recurse)
        device = self.no_mem_embed.device
        for module in self.modules():
            if isinstance(module, RoPEAttention):
                side = self.preprocessing.image_size // STRIDE
                if module.freqs_cis.device != device:
                    with torch.inference_mode(False), torch.device("cpu"):
                        module.freqs_cis = module.compute_cis(end_x=side, end_y=side).to(device)
            elif isinstance(module, PositionEmbeddingSine):
                module.cache = {}
        return self


def merged(looks: Sequence[Look], rows: Sequence[Tensor]) -> Look:
    """Put what was said to prompts of several forms in the order of the objects.

    Args:
        looks: One for each form.
        rows: For each which of the objects it was about.
    """
    back = torch.cat(list(rows)).argsort().to(looks[0].best.device, non_blocking=True)
    most = max(look.logits.shape[1] for look in looks)
    # one mask counts as several equal ones: the best of them, and their mean, are the same
    even = [
        replace(look, logits=look.logits.expand(-1, most, -1, -1), ious=look.ious.expand(-1, most))
        if look.logits.shape[1] < most
        else look
        for look in looks
    ]
    names = ("logits", "ious", "presence", "best", "full", "pointer")
    return Look(**{name: torch.cat([getattr(look, name) for look in even])[back] for name in names})


def _flat(maps: Tensor) -> Tensor:
    """Maps (Q, C, g, g) as tokens (g², Q, C)."""
    return maps.flatten(2).permute(2, 0, 1)


def _as_points(prompts: Prompts) -> tuple[Tensor, Tensor] | None:
    """Boxes and points as SAM2 takes them: points (Q, P, 2) with labels (Q, P); a box is two, labelled 2 and 3."""
    points, labels = [], []
    if prompts.boxes is not None:
        points.append(prompts.boxes.float().unflatten(1, (2, 2)))
        labels.append(torch.arange(2, 4, device=prompts.boxes.device).expand(len(prompts), 2))
    if prompts.points is not None and prompts.labels is not None:
        points.append(prompts.points.float())
        labels.append(prompts.labels)
    if not points:
        return None
    return torch.cat(points, dim=1), torch.cat(labels, dim=1).to(torch.int32)
