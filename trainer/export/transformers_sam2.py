"""SAM2 as transformers' Sam2VideoModel, whose folder serves Sam2Model too.

Shapes: Q objects, T frames, S input side, H W native height and width of a frame.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Sam2HieraDetConfig,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoMaskDecoderConfig,
    Sam2VideoModel,
    Sam2VideoProcessor,
    Sam2VideoPromptEncoderConfig,
    Sam2VideoVideoProcessor,
    Sam2VisionConfig,
)

from data_shards.errors import UserError
from trainer.export.base import FrameConsumer, PromptConsumer, VideoConsumer
from trainer.export.transformers_family import Family, image_settings, load_strictly, promptable, quietly
from trainer.models.sam2_memory import RecentMemory
from trainer.models.sam2_names import to_ours, to_transformers
from trainer.models.sam2_shape import STRIDE, SAM2Shape

MEMORY_WIDTH = 64
"""Channels of a memory that Sam2VideoModel's attention is built for, whatever its configuration says."""
_MASKS = (
    "Sam2VideoModel remembers a mask that it is shown as it is, and SAM2's own predictor what is left of it at a "
    "quarter of the side: what is followed from a mask differs a little. The gate compares what is followed from boxes."
)
_CLASSES = "Sam2VideoModel holds all of it and Sam2Model its image parts: both load from this folder."
_MEMORY = "Trained with {policy}; Sam2VideoModel remembers the frames just before, and the gate compares that."
_HALFTONES = (
    "Trained without postprocessing: Sam2VideoModel binarises what it remembers of a prompted frame all the same, so "
    "that only its answers in single images are compared."
)


class SAM2Family(Family):
    """Sam2VideoModel holds all of SAM2."""

    asks = "prompts and frames"

    def check(self, to: str) -> None:
        """Refuse another width of memories than the released models'."""
        width = self.model.shape.memory_width
        if width != MEMORY_WIDTH:
            raise UserError(
                f"a SAM2 with variant.memory_width {width} cannot be exported to '{to}': transformers' Sam2VideoModel "
                f"takes {MEMORY_WIDTH} and nothing else"
            )

    @property
    def architecture(self) -> type[Sam2VideoModel]:
        """Sam2VideoModel."""
        return Sam2VideoModel

    @property
    def postprocessing(self) -> bool:
        """Whether the run's model has SAM2's own postprocessing."""
        return bool(self.model.binarize_mask_from_pts_for_mem_enc)

    def config(self) -> Sam2VideoConfig:
        """What transformers calls a SAM2's sizes."""
        return video_config(
            self.model.shape, self.side, self.postprocessing, float(self.model.memory_attention.layers[0].dropout_value)
        )

    def renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Meta's names are ours."""
        return to_transformers(state)

    def base(self, state: Mapping[str, Tensor], layers: Collection[str]) -> Any:
        """A Sam2Model where the adapter is on nothing but its parts, else a Sam2VideoModel."""
        image = Sam2Model(image_config(self.config()))
        own = {name for name, _ in image.named_modules()}
        if not own.issuperset(layers):
            return super().base(state, layers)
        names = image.state_dict().keys()
        image.load_state_dict({name: one for name, one in state.items() if name in names}, strict=False)
        return image.eval()

    def processor(self) -> Sam2VideoProcessor:
        """SAM2's processor for images and for videos."""
        settings = image_settings(self.model.preprocessing, self.model.mask_side)
        images = Sam2ImageProcessor(**settings)
        settings.pop("mask_size")
        return Sam2VideoProcessor(images, Sam2VideoVideoProcessor(**settings))

    def answering(self, model: Any, folder: Path | None) -> PromptConsumer:
        """Ask with boxes, points and masks; a video model lends its image parts."""
        if isinstance(model, Sam2VideoModel):
            with torch.device("meta"):
                image = Sam2Model(image_config(model.config))
            for name, _ in [*image.named_children(), *image.named_parameters(recurse=False)]:
                setattr(image, name, getattr(model, name))
            model = image.eval()
        return promptable(model)

    def load(self, folder: Path) -> PromptConsumer | VideoConsumer:
        """Load Sam2VideoModel with every key, and Sam2Model, which leaves out what only the memory needs."""
        video = load_strictly(Sam2VideoModel, folder)
        image = promptable(load_strictly(Sam2Model, folder, others=video.state_dict().keys()))
        if not self.postprocessing:
            return image
        with quietly():
            processor = Sam2VideoProcessor.from_pretrained(folder, local_files_only=True)
        return VideoConsumer(image, _following(video, processor), _Named(video), masks=False)

    def notes(self, dtype: str) -> tuple[str, ...]:
        """Also which classes there are, and what they do not do as in the run."""
        found = [_CLASSES]
        if type(self.model.memory) is not RecentMemory:
            found.append(_MEMORY.format(policy=type(self.model.memory).__name__))
        found.append(_MASKS if self.postprocessing else _HALFTONES)
        return (*found, *super().notes(dtype))


def video_config(shape: SAM2Shape, side: int, postprocessing: bool = True, dropout: float = 0.1) -> Sam2VideoConfig:
    """What transformers calls a shape.

    Args:
        shape: Sizes of the model.
        side: Input side S in pixels.
        postprocessing: Whether a mask that is not stable gives way to the best of three.
        dropout: Share of the memory attention that drops out in training.
    """
    widths = shape.channels[::-1]
    trunk = Sam2HieraDetConfig(
        hidden_size=shape.embed_dim,
        num_attention_heads=shape.num_heads,
        image_size=[side, side],
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[shape.num_heads * 2**stage for stage in range(4)],
        blocks_per_stage=list(shape.stages),
        global_attention_blocks=list(shape.global_blocks),
        window_size_per_stage=list(shape.window_spec),
        window_positional_embedding_background_size=[shape.background, shape.background],
    )
    vision = Sam2VisionConfig(
        backbone_config=trunk,
        backbone_channel_list=shape.channels,
        backbone_feature_sizes=[[side // stride, side // stride] for stride in (STRIDE // 4, STRIDE // 2, STRIDE)],
        fpn_hidden_size=shape.width,
    )
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config=Sam2VideoPromptEncoderConfig(image_size=side, patch_size=STRIDE, hidden_size=shape.width),
        mask_decoder_config=Sam2VideoMaskDecoderConfig(
            hidden_size=shape.width, dynamic_multimask_via_stability=postprocessing
        ),
        image_size=side,
        num_maskmem=shape.memories,
        max_object_pointers_in_encoder=shape.pointers,
        memory_attention_hidden_size=shape.width,
        memory_attention_num_layers=shape.memory_layers,
        memory_attention_feed_forward_hidden_size=shape.feedforward,
        memory_attention_rope_feat_sizes=[side // STRIDE, side // STRIDE],
        memory_attention_dropout=dropout,
        memory_attention_rope_dropout=dropout,
        memory_encoder_hidden_size=shape.width,
        memory_encoder_output_channels=shape.memory_width,
        mask_downsampler_embed_dim=shape.width,
        memory_fuser_embed_dim=shape.width,
        memory_fuser_intermediate_dim=4 * shape.width,
    )


def image_config(whole: Any) -> Any:
    """Configuration of the image parts of a video model."""
    return Sam2Model.config_class(
        vision_config=whole.vision_config.to_dict(),
        prompt_encoder_config=_without_type(whole.prompt_encoder_config),
        mask_decoder_config=_without_type(whole.mask_decoder_config),
    )


def _without_type(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "model_type"}


class _Named(nn.Module):
    """A video model of transformers under the names of ours, as far as the gate asks for them."""

    def __init__(self, video: Any) -> None:
        super().__init__()
        self.video = video

    def state_dict(self, *arguments: Any, **named: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return to_ours(self.video.state_dict())

    @property
    def sam_mask_decoder(self) -> Any:
        head = SimpleNamespace(layers=[self.video.mask_decoder.pred_obj_score_head.proj_out])
        return SimpleNamespace(pred_obj_score_head=head)


def _following(video: Any, processor: Any) -> FrameConsumer:
    """Follow boxes from the first frame on, with the processor's own reading of frames and prompts."""

    def follow(frames: Sequence[np.ndarray], boxes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        coloured = [frame if frame.ndim == 3 else np.repeat(frame[..., None], 3, axis=2) for frame in frames]
        with quietly():
            session = processor.init_video_session(video=np.stack(coloured))
            objects = list(range(len(boxes)))
            processor.add_inputs_to_inference_session(session, 0, objects, input_boxes=[boxes.tolist()])
            answers = [one.pred_masks for one in video.propagate_in_video_iterator(session, start_frame_idx=0)]
        size = frames[0].shape[:2]
        masks = [F.interpolate(one, size, mode="bilinear", align_corners=False)[:, 0] for one in answers]
        return torch.stack([session.get_frame(number) for number in range(len(frames))]), torch.stack(masks)

    return follow
