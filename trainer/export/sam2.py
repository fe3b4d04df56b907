"""SAM2 in Meta's layout, as the builders of PyPI's `sam2` read it.

Shapes: Q objects, T frames, S input side, H W native height and width of a frame, h w = S/4 side of the masks.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_shards.errors import UserError
from trainer.export.base import Exporter, VideoConsumer
from trainer.models import SAM2Shape, SegmentationModel
from trainer.models.sam2_memory import RecentMemory
from trainer.models.sam2_shape import STRIDE, VARIANTS
from trainer.prompts import Prompts

if TYPE_CHECKING:
    from trainer.models import SAM2

CONFIGS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
"""What the consumer's configurations call the variants."""
CONFIG = "configs/sam2.1/sam2.1_hiera_{}.yaml"
RELEASED = 1024
"""Input side in these configurations, in pixels."""
_HOLES = "Where sam2 was built with its CUDA kernel, its video predictor also fills holes of up to 8 pixels."
_SIDE = (
    "Trained at {side} px, and these configurations are of 1024 px: build with hydra_overrides_extra="
    '["++model.image_size={side}"]; a SAM2ImagePredictor then needs _bb_feat_sizes = {sizes}.'
)
_SCALING = (
    "Trained on images scaled by {scaling} (see FILE.preprocessing.json), and sam2's predictors scale by Meta's mean "
    'and deviation: give SAM2ImagePredictor other _transforms; after init_state put other images into state["images"] '
    'and empty state["cached_features"].'
)
_MEMORY = "Trained with {policy}; sam2's video predictor remembers the frames just before, and the gate compares that."
_STABILITY = "Trained without postprocessing: build with apply_postprocessing=False."


class SAM2Exporter(Exporter):
    """Meta's ``.pt``: ``{"model": state dict}``; the consumer is the official video predictor.

    Args:
        variant: Which of the official configurations builds the consumer.
        side: Input side S in pixels that it is built for.
        postprocessing: Whether it is built with its own postprocessing.
        notes: What a user of the consumer should know.
    """

    name = "sam2"
    suffix = ".pt"
    package = "sam2"
    requirement = "sam2==1.1.0 (with SAM2_BUILD_CUDA=0 in the environment it needs no compiler)"
    asks = "prompts and frames"
    samples = 4  # beside the frames of a clip; at 1024 px the larger encoders take their time

    def __init__(
        self,
        variant: str = "tiny",
        side: int = RELEASED,
        postprocessing: bool = True,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.image_size, self.notes = side, notes
        self.builder = {
            "config_file": CONFIG.format(CONFIGS[variant]),
            "hydra_overrides_extra": [] if side == RELEASED else [f"++model.image_size={side}"],
            "apply_postprocessing": postprocessing,
        }

    def accepts(self, model: SegmentationModel) -> bool:
        """Whether it is a SAM2.

        Raises:
            UserError: It is one of a shape that no official configuration has.
        """
        shape = getattr(model, "shape", None)
        if isinstance(shape, SAM2Shape) and shape not in VARIANTS.values():
            nearest = min(VARIANTS.values(), key=lambda variant: len(_differing(shape, variant)))
            other = _differing(shape, nearest)[0]
            raise UserError(
                f"a SAM2 with variant.{other} {getattr(shape, other)} cannot be exported to '{self.name}': the "
                f"official configurations are of {', '.join(VARIANTS)} and no other"
            )
        return isinstance(shape, SAM2Shape)

    def for_model(self, model: SegmentationModel) -> SAM2Exporter:
        """The export with the official configuration that belongs to a model, at its input side."""
        sam2, side = cast("SAM2", model), model.preprocessing.image_size
        (variant,) = (name for name, shape in VARIANTS.items() if shape == sam2.shape)
        postprocessing = bool(sam2.binarize_mask_from_pts_for_mem_enc)
        notes = [f'Build with build_sam2_video_predictor("{CONFIG.format(CONFIGS[variant])}", FILE).', _HOLES]
        if side != RELEASED:
            sizes = [(side // stride, side // stride) for stride in (STRIDE // 4, STRIDE // 2, STRIDE)]
            notes.append(_SIDE.format(side=side, sizes=sizes))
        if model.preprocessing.scaling != "mean_std":
            notes.append(_SCALING.format(scaling=model.preprocessing.scaling))
        if type(sam2.memory) is not RecentMemory:
            notes.append(_MEMORY.format(policy=type(sam2.memory).__name__))
        if not postprocessing:
            notes.append(_STABILITY)
        return SAM2Exporter(variant, side, postprocessing, tuple(notes))

    def write(self, model: SegmentationModel, path: Path) -> None:
        """Write the state dict, whose names are the consumer's."""
        torch.save({"model": self.state(model)}, path)

    def load(self, path: Path) -> VideoConsumer:
        """Build the official video predictor on the CPU with the file; it loads strictly itself."""
        from sam2.build_sam import build_sam2_video_predictor

        # it would make some of its tables on a GPU
        with mock.patch("torch.cuda.is_available", return_value=False):
            predictor = build_sam2_video_predictor(ckpt_path=str(path), device="cpu", **self.builder)

        def logits(image: Tensor, asked: Sequence[Prompts]) -> list[Tensor]:
            found = predictor.forward_image(image)["backbone_fpn"]
            return [_answer(predictor, found, prompts) for prompts in asked]

        def follow(frames: Sequence[np.ndarray], boxes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return _follow(predictor, frames, boxes, mask)

        return VideoConsumer(logits, follow, predictor)


def _differing(one: SAM2Shape, other: SAM2Shape) -> list[str]:
    return [name for name, size in vars(one).items() if getattr(other, name) != size]


def _answer(predictor: Any, features: Sequence[Tensor], asked: Prompts) -> Tensor:
    """Prompts as SAM2ImagePredictor asks them: logits (Q, h, w), before it cuts them off at ±32."""
    high, middle, top = features
    if asked.boxes is not None:
        points, labels = asked.boxes.reshape(-1, 2, 2), torch.tensor([[2, 3]]).expand(len(asked), 2)
    else:
        assert asked.points is not None and asked.labels is not None
        points, labels = asked.points, asked.labels
    start = None if asked.masks is None else asked.masks[:, None]
    sparse, dense = predictor.sam_prompt_encoder(points=(points, labels.int()), boxes=None, masks=start)
    masks: Tensor = predictor.sam_mask_decoder(
        image_embeddings=top + predictor.no_mem_embed.reshape(1, -1, 1, 1),
        image_pe=predictor.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
        repeat_image=len(asked) > 1,
        high_res_features=[high, middle],
    )[0]
    return masks[:, 0]


def _follow(predictor: Any, frames: Sequence[np.ndarray], boxes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes and a mask in the first frame, followed through all of them with the predictor's own loader and loop."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(io.StringIO()),  # its progress bars
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # that holes are not filled without CUDA
        for number, frame in enumerate(frames):  # it takes JPEGs named by number
            Image.fromarray(frame).save(Path(folder) / f"{number}.jpg", quality=95)
        state = predictor.init_state(folder)
        for number, box in enumerate(boxes):
            predictor.add_new_points_or_box(state, frame_idx=0, obj_id=number, box=box.numpy())
        predictor.add_new_mask(state, frame_idx=0, obj_id=len(boxes), mask=mask)
        masks = [found[:, 0].clone() for _, _, found in predictor.propagate_in_video(state)]
    return state["images"], torch.stack(masks)
