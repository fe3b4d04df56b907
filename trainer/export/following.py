"""The part of the gate that is about a memory: both follow the same objects through a clip.

Shapes: Q objects, T frames, S input side, H W native height and width of a frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.export.base import VideoConsumer
from trainer.prompts import Prompts
from trainer.volumes.asked import Asked, prompts_of

if TYPE_CHECKING:
    from trainer.models import SAM2
    from trainer.models.sam2 import SAM2Features

ABSENT = -1024.0
"""Logit of what SAM2 holds to be absent."""
RAISED = 1e4
"""What is added to the score of an object's being there, where nothing would be followed without it."""


@dataclass(frozen=True)
class Clip:
    """Real frames to follow targets through.

    Attributes:
        frames: T frames, (H, W) or (H, W, 3) uint8.
        boxes: (Q, 4) float32, tight boxes of targets of the first frame as (x0, y0, x1, y1), in its pixels.
        mask: (H, W), nonzero inside: the first of these targets; where it is None, the inside of its box stands for it.
    """

    frames: tuple[np.ndarray, ...]
    boxes: Tensor
    mask: Tensor | None = None


def follow_both(consumer: VideoConsumer, model: SAM2, clip: Clip) -> dict[str, Any]:
    """Let both follow a clip's targets, each by itself: what `trainer.export.gate.Verdict` says of it.

    Each target is shown by its box, and the first one a second time by its mask, if the consumer takes that. Where the
    consumer holds everything to be absent after the first frame, -1024 throughout is no proof: both follow once more,
    with the score of an object's being there raised by the same amount, ours in a copy.

    Args:
        consumer: The consumer, with the file.
        model: Our model at the consumer's input side.
        clip: The frames.
    """
    size = clip.frames[0].shape[:2]
    shown = [Asked(str(place), 0, box=tuple(box)) for place, box in enumerate(clip.boxes.tolist())]
    shown.append(Asked("mask", 0, mask=_mask(clip)))
    asked = [prompts_of([one], model.preprocessing, size) for one in shown]
    given = asked[-1][0].given
    assert given is not None
    if not consumer.masks:
        shown, asked = shown[:-1], asked[:-1]
    images, theirs = consumer.follow(clip.frames, clip.boxes, given[0] > 0.5)
    with torch.no_grad():
        features = [model.encode(image[None]) for image in images]  # of the very frames that the consumer has read
        differences = [_difference(model, features, asked, theirs)]
        frames_shown, raised = _shown(theirs), None
        if not frames_shown:
            copy = model.at_size(model.preprocessing.image_size)
            with raised_scores(copy, consumer.module):
                _, theirs = consumer.follow(clip.frames, clip.boxes, given[0] > 0.5)
                differences.append(_difference(copy, features, asked, theirs))
            raised = _shown(theirs)
    return {
        "max_followed_difference": float(torch.stack(differences).max()),
        "frames": len(images),
        "frames_shown": frames_shown,
        "followed": tuple("box" if one.mask is None else "mask" for one in shown),
        "frames_shown_raised": raised,
    }


@contextmanager
def raised_scores(*models: nn.Module) -> Iterator[None]:
    """Let SAM2s hold everything to be there while this lasts."""
    biases: list[Tensor] = [model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data for model in models]  # type: ignore[union-attr, index]
    before = [bias.clone() for bias in biases]
    try:
        for bias in biases:
            bias += RAISED
        yield
    finally:
        for bias, was in zip(biases, before, strict=True):
            bias.copy_(was)


def unequal_tensors(consumer: nn.Module, model: nn.Module) -> tuple[str, ...]:
    """Names of those tensors that the consumer holds otherwise than our model; names are the same in both."""
    ours, theirs = model.state_dict(), consumer.state_dict()
    same = {name for name in ours.keys() & theirs.keys() if torch.equal(ours[name].float().cpu(), theirs[name].float())}
    return tuple(name for name in {**ours, **theirs} if name not in same)


def _mask(clip: Clip) -> np.ndarray:
    """The first target's mask: (H, W) bool."""
    if clip.mask is not None:
        return clip.mask.numpy() != 0
    mask = np.zeros(clip.frames[0].shape[:2], bool)
    x0, y0, x1, y1 = (int(edge) for edge in clip.boxes[0].tolist())
    mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return mask


def _shown(logits: Tensor) -> int:
    """Frames after the first in which anything is held to be there; logits (T, Q, H, W)."""
    return int((logits[1:].flatten(1).amax(1) > ABSENT / 2).sum())  # resizing may round it


def _difference(
    model: SAM2, features: Sequence[SAM2Features], asked: Sequence[Sequence[Prompts]], theirs: Tensor
) -> Tensor:
    """Largest difference of our logits from the consumer's, (T, Q, H, W), in any frame."""
    from trainer.models.sam2_memory import RecentMemory
    from trainer.models.sam2_tracking import Tracking

    differences = []
    policy = model.memory
    try:
        model.memory = RecentMemory()  # as the consumer remembers
        for q, prompts in enumerate(asked):
            tracking = Tracking(model, len(features))
            looks = [tracking.ask(0, features[0], prompts)]
            looks += [tracking.follow(frame, features[frame]) for frame in range(1, len(features))]
            best = torch.stack([look.best for look in looks])
            ours = F.interpolate(best, theirs.shape[-2:], mode="bilinear", align_corners=False)
            differences.append((ours[:, 0] - theirs[:, q]).abs().max())
    finally:
        model.memory = policy
    return torch.stack(differences).max()
