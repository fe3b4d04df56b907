"""The objects that are followed through the clips of a batch, laid out frame by frame.

Shapes: B clips, T frames of each, Q objects, S the model's input side, H W native height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.batch import TripletBatch
from trainer.metrics import overlap
from trainer.models import Preprocessing
from trainer.prompts import Prompts, Truth, bucket_of

if TYPE_CHECKING:
    from trainer.models.sam2 import Look

NOWHERE = 2**20
"""Stands for the number of a target that is not there, where something random depends on it."""


@dataclass(frozen=True)
class Followed:
    """What is followed through the clips of a batch.

    Frames are counted in the order in which they are followed: a clip whose anchor is its last frame is turned round.

    Attributes:
        clip: (Q,) int64, the clip of each object, on the CPU.
        anchors: B frames that are prompted.
        image: (T, Q) int64, the image of each frame, on the CPU.
        rows: (T, Q) int64, the target that shows it, −1 where it is not there, on the CPU.
        masks: (T, Q, S, S) float32 of 0 and 1, on the device.
        boxes: (T, Q, 4) float32 in pixels of the input, 0 where it is not there.
        sizes: (Q, 2) height and width of the valid part of the input.
        draws: For each frame and object what its randomness depends on.
        mask_side: Side of a mask that the model takes as a prompt.
    """

    clip: Tensor
    anchors: list[int]
    image: Tensor
    rows: Tensor
    masks: Tensor
    boxes: Tensor
    sizes: Tensor
    draws: list[list[tuple[int, ...]]]
    mask_side: int

    def __len__(self) -> int:
        return len(self.clip)

    def subset(self, objects: Tensor) -> Followed:
        """Some of the objects; (N,) int64 on the CPU."""
        there = objects.to(self.masks.device, non_blocking=True)
        return replace(
            self,
            clip=self.clip[objects],
            image=self.image[:, objects],
            rows=self.rows[:, objects],
            masks=self.masks[:, there],
            boxes=self.boxes[:, objects],
            sizes=self.sizes[objects],
            draws=[[row[q] for q in objects.tolist()] for row in self.draws],
        )

    def padded(self) -> Followed:
        """So many objects that few numbers occur (`bucket_of`): the first is followed again and again, at the end."""
        more = bucket_of(len(self)) - len(self)
        return self.subset(torch.cat([torch.arange(len(self)), torch.zeros(more, dtype=torch.int64)])) if more else self

    def truth(self, frame: int) -> Truth:
        """The objects in a frame, for prompts to be simulated from."""
        index = torch.arange(len(self))
        return Truth(index, self.boxes[frame], self.sizes, self.masks[frame], self.draws[frame], self.mask_side)


def followed(batch: TripletBatch, preprocessing: Preprocessing, mask_side: int, device: torch.device | str) -> Followed:
    """Lay out the objects of a batch.

    Args:
        batch: Clips, or single images, which are clips of one frame; each term of an image is one target.
        preprocessing: The model's.
        mask_side: Side of a mask that the model takes as a prompt.
        device: Where masks are made.
    """
    frames, clips = batch.frames, len(batch) // batch.frames
    given = batch.anchors or [0] * clips
    turned = [frames > 1 and anchor == frames - 1 for anchor in given]
    anchors = [0 if turn else anchor for turn, anchor in zip(turned, given, strict=True)]
    places: dict[tuple[int, int], list[int]] = {}
    for row, (image, thing) in enumerate(zip(batch.image_index.tolist(), batch.objects, strict=True)):
        clip, frame = divmod(image, frames)
        local = frames - 1 - frame if turned[clip] else frame
        places.setdefault((clip, thing), [-1] * frames)[local] = row
    places = {who: rows for who, rows in sorted(places.items()) if rows[anchors[who[0]]] >= 0}
    rows = torch.tensor(list(places.values()), dtype=torch.int64).reshape(-1, frames).T
    clip_of = torch.tensor([clip for clip, _ in places], dtype=torch.int64)
    order = torch.arange(frames)[:, None].expand(-1, len(places))
    turn = torch.tensor([turned[clip] for clip, _ in places], dtype=torch.bool)
    image = clip_of * frames + torch.where(turn, frames - 1 - order, order)
    boxes, sizes = preprocessing.boxes(batch.boxes, batch.sizes)
    masks = preprocessing.masks(batch.masks, device)
    masks = torch.cat([masks, masks.new_zeros(1, *masks.shape[1:])])  # row −1 is an empty one
    boxes = torch.cat([boxes, boxes.new_zeros(1, 4)])
    draws = batch.draws
    drawn = [
        [
            draws[row] if row >= 0 else (batch.positions[where], NOWHERE + thing)
            for row, where, (_, thing) in zip(rows[frame].tolist(), image[frame].tolist(), places, strict=True)
        ]
        for frame in range(frames)
    ]
    first = torch.tensor([some[anchors[clip]] for (clip, _), some in places.items()], dtype=torch.int64)
    return Followed(
        clip_of,
        anchors,
        image,
        rows,
        masks[rows.to(masks.device, non_blocking=True)],
        boxes[rows],
        sizes[first],
        drawn,
        mask_side,
    )


def clip_draws(batch: TripletBatch) -> list[tuple[int, ...]]:
    """What a clip's randomness may depend on: its first sample, and the repeat where it is not the first."""
    starts = range(0, len(batch), batch.frames)
    return [
        (batch.positions[start], *[repeat for repeat in batch.repeats[start : start + 1] if repeat]) for start in starts
    ]


def with_absences(batch: TripletBatch) -> TripletBatch:
    """The batch with what is followed named as absent in the frames that do not show it, frame by frame."""
    frames = batch.frames
    things: dict[tuple[int, int], tuple[str, set[int]]] = {}
    for image, thing, term in zip(batch.image_index.tolist(), batch.objects, batch.terms, strict=True):
        things.setdefault((image // frames, thing), (term, set()))[1].add(image)
    gone = [
        (image, term)
        for (clip, _), (term, shown) in sorted(things.items())
        for image in range(clip * frames, (clip + 1) * frames)
        if image not in shown
    ]
    index = torch.tensor([image for image, _ in gone], dtype=torch.int64)
    return replace(batch, absent_terms=[term for _, term in gone], absent_index=index)


NUMBERS = 2**32
"""More than the objects of a clip."""


def rows_of(prompts: Prompts, rows: Tensor) -> Tensor:
    """The batch's targets that prompts ask about, from the rows of their group."""
    return rows if prompts.rows is None else rows[prompts.rows]


def smaller(masks: Tensor, side: int) -> Tensor:
    """Masks (Q, S, S) of 0 and 1 on a coarser grid: the nearest pixel, and what would be gone keeps one."""
    if masks.shape[-1] == side:
        return masks
    near = F.interpolate(masks[:, None], (side, side), mode="nearest-exact")[:, 0]
    any_of = F.adaptive_max_pool2d(masks[:, None], side)[:, 0]
    return torch.where(near.flatten(1).amax(1)[:, None, None] > 0, near, any_of)


def found_dsc(groups: Sequence[tuple[Followed, dict[int, Look], Any]]) -> Tensor:
    """Mean DSC of the last answers to the frames that were found (to the prompted one, of single images)."""
    values, weights = [], []
    for group, looks, _ in groups:
        anchor = group.anchors[int(group.clip[0])]
        for frame, look in looks.items():
            if frame == anchor and len(looks) > 1:
                continue
            truth = smaller(group.masks[frame], look.best.shape[-1])
            dsc, _ = overlap(look.best.detach() > 0, truth)
            there = truth.flatten(1).amax(1)
            values.append(dsc * there)
            weights.append(there)
    return torch.cat(values).sum() / torch.cat(weights).sum().clamp(min=1)
