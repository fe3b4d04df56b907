"""One slice is shown, the volume is segmented: objects are followed from their slice to both ends.

SAM2 follows through its memory. SAM, MedSAM and LiteMedSAM have none: the mask of slice k makes the box that they are
asked with on slice k ± 1.

Shapes: N objects, M those of one group, D slices, H W native height and width, S the model's input side, h w mask side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from data_shards.errors import UserError
from trainer.models import SAM3, SegmentationModel
from trainer.prompts.base import Prompts
from trainer.prompts.boxes import push
from trainer.volumes.asked import Asked, check_asked, prompts_of, tight_box
from trainer.volumes.linking import SliceObjects
from trainer.volumes.stack import Stack

Precision = Literal["32-true", "bf16-mixed"]
Found = tuple[int, np.ndarray, np.ndarray]
"""Number of a slice, masks (N, H, W) bool, and the model's own estimates (N,) float32 of their IoU, 0 where it finds
nothing."""


def propagate(
    model: SegmentationModel,
    stack: Stack,
    asked: Sequence[Asked],
    *,
    first: int = 0,
    last: int | None = None,
    initial: SegmentationModel | None = None,
    margin: int = 0,
    at_once: int = 16,
    precision: Precision = "32-true",
) -> Iterator[Found]:
    """Segment objects in all slices, each shown on one.

    Slices are read one by one, encoded once in each direction for all objects, and given back as soon as all objects
    have their answer: what is held does not grow with the number of slices. Where objects are shown on different
    slices, the masks between these are held as run lengths until the way back.

    Args:
        model: SAM2, SAM, MedSAM or LiteMedSAM, on its device. It is in evaluation mode while this runs.
        stack: The volume or video.
        asked: The objects.
        first: First slice that is wanted.
        last: Last one; that of the volume if None.
        initial: Another model that answers on the slices where objects are shown by box or points; `model` goes on
            from its masks.
        margin: Native pixels by which the box of the slice before is enlarged on every side; models without memory.
        at_once: Objects that are decoded together.
        precision: ``bf16-mixed`` is for GPUs.

    Yields:
        Each slice once: from the last slice that shows an object to `last`, then down to `first`.

    Raises:
        UserError: The model is asked in words, or `check_asked` finds a mistake.
    """
    last = len(stack) - 1 if last is None else last
    check_asked(asked, stack, first, last)
    check_following((model, initial), margin, at_once)
    # a generator's body runs only when it is asked for a slice: mistakes are told before
    return _propagated(_Session(stack, margin, at_once, precision), model, list(asked), (first, last), initial)


def check_following(models: Sequence[SegmentationModel | None], margin: int, at_once: int) -> None:
    """Raise a `UserError` where a model is asked in words alone, or a setting of `propagate` is out of its range."""
    if any(isinstance(one, SAM3) for one in models):
        raise UserError(
            "SAM3 is asked in words, not with boxes, points and masks on a slice: `trainer predict --volume IMAGE "
            "--text TERM` names what to find"
        )
    if margin < 0:
        raise UserError(f"--margin {margin}: 0 pixels or more")
    if at_once < 1:
        raise UserError(f"--at-once {at_once}: 1 object or more")


def look(model: SegmentationModel, stack: Stack, number: int, precision: Precision = "32-true") -> Any:
    """Encode one slice, for `answer`: whoever asks about it again and again keeps what this gives."""
    return _encoded(_Session(stack, 0, 1, precision), model, number)


def answer(
    model: SegmentationModel, stack: Stack, asked: Sequence[Asked], features: Any, precision: Precision = "32-true"
) -> tuple[np.ndarray, np.ndarray]:
    """Segment M objects on the one slice that shows them, as `propagate` does there.

    Args:
        model: In evaluation mode; see `propagate`.
        stack: The volume or video.
        asked: The objects, all shown on one slice.
        features: What `look` gave for it.
        precision: As for `look`.

    Returns:
        Masks (M, H, W) bool and scores (M,).

    Raises:
        UserError: As `propagate`.
    """
    session = _Session(stack, 0, max(1, len(asked)), precision)
    check_asked(asked, stack, asked[0].slice, asked[0].slice)
    check_following((model,), session.margin, session.at_once)
    return _followers(session, model, asked)[0].begin(features)


def copied(asked: Sequence[Asked], first: int, last: int) -> Iterator[Found]:
    """The baseline that any propagation should beat: each object's mask, repeated in every slice.

    Args:
        asked: N objects with masks.
        first: First slice.
        last: Last one.
    """
    masks = np.stack([one.mask for one in asked if one.mask is not None])
    for number in range(first, last + 1):
        yield number, masks, np.ones(len(masks), np.float32)


@dataclass(frozen=True)
class _Session:
    """What is the same for all objects of a propagation."""

    stack: Stack
    margin: int
    at_once: int
    precision: Precision

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bf16-mixed" else nullcontext()


class Follower(ABC):
    """Follows objects that are shown on one slice: first up to the last slice, then down from it to the first.

    Args:
        session: Of the propagation.
        model: The model.
        asked: M objects of one slice.
        rows: (M,) their places among all objects.
    """

    def __init__(self, session: _Session, model: Any, asked: Sequence[Asked], rows: Sequence[int]) -> None:
        self.session, self.model, self.asked, self.rows = session, model, list(asked), list(rows)
        self.slice, self.size = asked[0].slice, session.stack.size

    @abstractmethod
    def begin(self, features: Any) -> tuple[np.ndarray, np.ndarray]:
        """Answer on the slice where the objects are shown: masks (M, H, W) bool and scores (M,)."""

    @abstractmethod
    def follow(self, number: int, features: Any, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
        """Answer on the next slice, in the same form."""

    def lost(self, reverse: bool) -> bool:
        """Whether nothing more can be found in a direction, so that a slice need not be read."""
        return False

    def native(self, logits: Tensor) -> np.ndarray:
        """Mask logits (M, h, w) at native size: (M, H, W) bool."""
        masks: np.ndarray = (self.model.preprocessing.to_native(logits, *self.size) > 0).cpu().numpy()
        return masks


class BoxChain(Follower):
    """The box of the next slice is the tight box of this one's mask; where that is empty, the object has ended."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._shown: list[tuple[float, float, float, float] | None] = [None] * len(self.asked)
        self._boxes: dict[bool, list[tuple[float, float, float, float] | None]] = {}

    def begin(self, features: Any) -> tuple[np.ndarray, np.ndarray]:
        """Decode box and points; a mask is the answer itself."""
        masks, scores = np.zeros((len(self.asked), *self.size), bool), np.ones(len(self.asked), np.float32)
        for row, one in enumerate(self.asked):
            if one.mask is not None:
                masks[row] = one.mask
        rows = [row for row, one in enumerate(self.asked) if one.mask is None]
        if rows:
            asked = prompts_of([self.asked[row] for row in rows], self.model.preprocessing, self.size)
            masks[rows], scores[rows] = self._decode(features, asked, len(rows))
        boxes = [tight_box(mask) for mask in masks]
        self._boxes = {False: boxes, True: list(boxes)}
        return masks, scores

    def lost(self, reverse: bool) -> bool:
        """Whether all objects have ended in a direction."""
        return bool(self._boxes) and not any(self._boxes[reverse])

    def follow(self, number: int, features: Any, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ask with the boxes of the slice before."""
        masks, scores = np.zeros((len(self.asked), *self.size), bool), np.zeros(len(self.asked), np.float32)
        boxes = self._boxes[reverse]
        rows = [row for row, box in enumerate(boxes) if box is not None]
        if rows:
            native = torch.tensor([boxes[row] for row in rows])
            sizes = torch.tensor([self.size]).expand(len(rows), 2)
            native = push(native, torch.full_like(native, float(self.session.margin)), sizes)
            asked, _ = self.model.preprocessing.boxes(native, sizes)
            places = torch.arange(len(rows))
            masks[rows], scores[rows] = self._decode(features, [Prompts(places, boxes=asked, rows=places)], len(rows))
        self._boxes[reverse] = [tight_box(mask) for mask in masks]
        return masks, scores

    @torch.no_grad()
    def _decode(self, features: Tensor, asked: Sequence[Prompts], count: int) -> tuple[np.ndarray, np.ndarray]:
        masks, scores = np.zeros((count, *self.size), bool), np.zeros(count, np.float32)
        for prompts in asked:
            assert prompts.rows is not None
            # all ask about the one image
            one = replace(prompts, image_index=torch.zeros_like(prompts.image_index)).to(features.device)
            with self.session.autocast(features.device):
                logits, quality = self.model.decode(features, one)
            masks[prompts.rows.numpy()] = self.native(logits[:, 0])
            scores[prompts.rows.numpy()] = quality[:, 0].float().cpu().numpy()
        return masks, scores


class MemoryTrack(Follower):
    """SAM2's memory, as its video predictor leads it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        from trainer.models.sam2_tracking import Tracking

        # an object whose first mask, another model's, is empty is nowhere
        self._there = [row for row, one in enumerate(self.asked) if one.mask is None or one.mask.any()]
        self._tracking = Tracking(self.model, frames=len(self.session.stack))

    @torch.no_grad()
    def begin(self, features: Any) -> tuple[np.ndarray, np.ndarray]:
        """Show the objects; a mask is the answer itself."""
        asked = prompts_of([self.asked[row] for row in self._there], self.model.preprocessing, self.size)
        masks, scores = self._answer(features, lambda mine: self._tracking.ask(self.slice, mine, asked))
        for row in self._there:
            mask = self.asked[row].mask
            if mask is not None:
                masks[row], scores[row] = mask, 1.0
        return masks, scores

    def lost(self, reverse: bool) -> bool:
        """Whether no object was shown; memories may find again what has gone."""
        return not self._there

    @torch.no_grad()
    def follow(self, number: int, features: Any, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
        """Look by what is remembered."""
        return self._answer(features, lambda mine: self._tracking.follow(number, mine, reverse))

    def _answer(self, features: Any, look: Callable[[Any], Any]) -> tuple[np.ndarray, np.ndarray]:
        masks, scores = np.zeros((len(self.asked), *self.size), bool), np.zeros(len(self.asked), np.float32)
        if not self._there:
            return masks, scores
        with self.session.autocast(features.top.device):
            seen = look(features.take(torch.zeros(len(self._there), dtype=torch.int64)))
        masks[self._there] = self.native(seen.best)
        scores[self._there] = (seen.ious.amax(1) * (seen.presence > 0)).float().cpu().numpy()
        return masks, scores


def _followers(session: _Session, model: SegmentationModel, asked: Sequence[Asked]) -> list[Follower]:
    """Objects that are shown on one slice go together, so many at once."""
    kind: type[Follower] = MemoryTrack if hasattr(model, "look") else BoxChain
    groups: list[Follower] = []
    for number in sorted({one.slice for one in asked}):
        rows = [row for row, one in enumerate(asked) if one.slice == number]
        for start in range(0, len(rows), session.at_once):
            some = rows[start : start + session.at_once]
            groups.append(kind(session, model, [asked[row] for row in some], some))
    return groups


def _propagated(
    session: _Session,
    model: SegmentationModel,
    asked: list[Asked],
    limits: tuple[int, int],
    initial: SegmentationModel | None,
) -> Iterator[Found]:
    states = [(one, one.training) for one in (model, initial) if one is not None]
    try:
        for one, _ in states:
            one.eval()
        if initial is not None:
            asked = _answered(session, initial, asked)
        yield from _swept(session, model, _followers(session, model, asked), limits, len(asked))
    finally:
        for one, training in states:
            one.train(training)


def _answered(session: _Session, model: SegmentationModel, asked: Sequence[Asked]) -> list[Asked]:
    """Replace box and points by the masks that a model answers them with."""
    answered = list(asked)
    open_rows = [row for row, one in enumerate(asked) if one.mask is None]
    groups = _followers(session, model, [asked[row] for row in open_rows])
    for number in sorted({group.slice for group in groups}):
        features = _encoded(session, model, number)
        for group in groups:
            if group.slice == number:
                masks, _ = group.begin(features)
                for place, mask in zip(group.rows, masks, strict=True):
                    answered[open_rows[place]] = replace(asked[open_rows[place]], mask=mask)
    return answered


def _swept(
    session: _Session, model: SegmentationModel, groups: Sequence[Follower], limits: tuple[int, int], count: int
) -> Iterator[Found]:
    """Forwards from the first slice that shows something, then backwards from before the last one that does."""
    lowest, highest = groups[0].slice, groups[-1].slice
    held: dict[int, SliceObjects] = {}
    for number in range(lowest, limits[1] + 1):
        masks, scores = np.zeros((count, *session.stack.size), bool), np.zeros(count, np.float32)
        _look(session, model, [group for group in groups if group.slice <= number], number, masks, scores)
        if number < highest:  # some objects come here on the way back
            held[number] = SliceObjects.encoded(number, masks, scores)
        else:
            yield number, masks, scores
    for number in range(highest - 1, limits[0] - 1, -1):
        if number in held:
            kept = held.pop(number)
            masks, scores = coco_mask.decode(list(kept.rles)).transpose(2, 0, 1).astype(bool), kept.confidences
        else:
            masks, scores = np.zeros((count, *session.stack.size), bool), np.zeros(count, np.float32)
        _look(session, model, [group for group in groups if group.slice > number], number, masks, scores, reverse=True)
        yield number, masks, scores


def _look(
    session: _Session,
    model: SegmentationModel,
    groups: Sequence[Follower],
    number: int,
    masks: np.ndarray,
    scores: np.ndarray,
    reverse: bool = False,
) -> None:
    """Put the answers of some groups about a slice where they belong; it is encoded once, if anyone looks at it."""
    groups = [group for group in groups if group.slice == number or not group.lost(reverse)]
    if not groups:
        return
    features = _encoded(session, model, number)
    for group in groups:
        shown = group.slice == number
        masks[group.rows], scores[group.rows] = (
            group.begin(features) if shown else group.follow(number, features, reverse)
        )


@torch.no_grad()
def _encoded(session: _Session, model: SegmentationModel, number: int) -> Any:
    device = next(model.parameters()).device
    images = model.preprocessing.images([session.stack.image(number)], device)
    with session.autocast(device):
        return model.encode(images)
