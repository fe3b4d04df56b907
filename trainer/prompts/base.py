"""What a mask decoder is asked, and who asks it.

Shapes: B images, Q prompts (flattened over the batch), each pointing at its image; P points a prompt, S the model's
input side, h w the mask side of the model's decoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_DECODED = ("image_index", "boxes", "points", "labels", "masks", "given")
"""What a decoder takes of prompts."""


@dataclass(frozen=True)
class Prompts:
    """What a mask decoder is asked: prompts of one form, so that no padding is needed.

    A batch in which some targets have a box and others have points is asked in several of these.

    Attributes:
        image_index: (Q,) int64, the image in the batch that each prompt asks about.
        boxes: (Q, 4) float32 as (x0, y0, x1, y1) in pixels of the model's input.
        points: (Q, P, 2) float32 as (x, y) in the same pixels.
        labels: (Q, P) int64, 1 for a point on the target, 0 for one beside it, −1 for none, where no pixel was left to
            point at: SAM's own padding.
        masks: (Q, h, w) float32, logits of a mask to start from.
        given: (Q, S, S) float32 of 0 and 1, a mask that is taken for the answer itself: SAM2's mask prompts.
        rows: (Q,) int64, which of the batch's targets these ask about, on the CPU; all of them, in order, if None.
    """

    image_index: Tensor
    boxes: Tensor | None = None
    points: Tensor | None = None
    labels: Tensor | None = None
    masks: Tensor | None = None
    given: Tensor | None = None
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image_index)

    def to(self, device: torch.device | str) -> Prompts:
        """Move what the decoder takes, without waiting for the device that it is moved to."""
        there = {name: tensor for name in _DECODED if (tensor := getattr(self, name)) is not None}
        return replace(self, **{name: to_device(tensor, device) for name, tensor in there.items()})

    def padded(self) -> Prompts:
        """So many that few numbers occur (`bucket_of`): the first is asked again, at the end and without a row.

        Decoders answer each prompt on its own: whoever pads leaves out the last answers, and neither values nor
        gradients of the others change.
        """
        more = bucket_of(len(self)) - len(self)
        if not more:
            return self
        there = {name: tensor for name in _DECODED if (tensor := getattr(self, name)) is not None}
        return replace(self, **{name: torch.cat([t, t[:1].expand(more, *t.shape[1:])]) for name, t in there.items()})

    def subset(self, places: Tensor) -> Prompts:
        """Those at some places (N,) of these, int64 on the CPU."""
        rows = torch.arange(len(self)) if self.rows is None else self.rows
        taken = {name: _take(tensor, places) for name in _DECODED if (tensor := getattr(self, name)) is not None}
        return Prompts(**taken, rows=rows[places])


@dataclass(frozen=True)
class Truth:
    """The targets of a batch, which prompts are simulated from.

    Attributes:
        image_index: (Q,) int64, the image of each target.
        boxes: (Q, 4) float32 tight boxes (x0, y0, x1, y1) in pixels of the model's input.
        sizes: (Q, 2) height and width, in the same pixels, of the image's valid area: prompts stay inside.
        masks: (Q, S, S) float32 of 0 and 1, on the device.
        draws: For each target what its randomness may depend on: (sample position in its corpus, target position in
            its sample), and in an epoch that shows a sample more than once, the number of the repeat.
        mask_side: Side h = w in pixels of a mask that the model takes as a prompt, and of those that it gives.
    """

    image_index: Tensor
    boxes: Tensor
    sizes: Tensor
    masks: Tensor
    draws: Sequence[tuple[int, ...]]
    mask_side: int = 256

    def __len__(self) -> int:
        return len(self.draws)

    def subset(self, rows: Tensor) -> Truth:
        """Some of the targets; rows (N,) int64 on the CPU."""
        return Truth(
            _take(self.image_index, rows),
            _take(self.boxes, rows),
            _take(self.sizes, rows),
            _take(self.masks, rows),
            [self.draws[row] for row in rows.tolist()],
            self.mask_side,
        )


class Prompter(ABC):
    """Simulates what a user would ask. What is drawn is a pure function of (seed, epoch, sample, target)."""

    @abstractmethod
    def first(self, truth: Truth, epoch: int | None) -> list[Prompts]:
        """Ask about every target once.

        Args:
            truth: The targets.
            epoch: The epoch in training, None in evaluation: nothing is random then.

        Returns:
            Prompts of one form each, whose `rows` together are all targets.
        """

    def rounds(self, epoch: int | None) -> int:
        """How often `correct` is called after `first`; the epoch is None in evaluation."""
        return 0

    def correct(
        self, asked: list[Prompts], logits: Tensor, truth: Truth, epoch: int | None, correction: int
    ) -> list[Prompts]:
        """Ask again, with what was wrong in the answers.

        Args:
            asked: What was asked in the round before.
            logits: (Q, h, w) the answers, detached, in the order of the batch's targets.
            truth: The targets.
            epoch: The epoch in training, None in evaluation.
            correction: Number of the correction, from 0.

        Returns:
            As `first` does.
        """
        raise NotImplementedError(f"{type(self).__name__} does not correct")

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What an evaluation asks, as JSON."""


def merged(asked: Sequence[Prompts]) -> list[Prompts]:
    """Put prompts of the same form together, so that a decoder is called as seldom as possible.

    Returns:
        Prompts of one form each, in the order in which the forms came, the targets of each in ascending order.
    """
    forms: dict[tuple[torch.Size | None, ...], list[Prompts]] = {}
    for prompts in asked:
        form = tuple(None if tensor is None else tensor.shape[1:] for tensor in (getattr(prompts, n) for n in _DECODED))
        forms.setdefault(form, []).append(prompts)
    return [parts[0] if len(parts) == 1 else _joined(parts) for parts in forms.values()]


def _joined(parts: Sequence[Prompts]) -> Prompts:
    names = [name for name in _DECODED if getattr(parts[0], name) is not None]
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    rows = torch.cat([torch.arange(len(part)) if part.rows is None else part.rows for part in parts])
    return Prompts(**whole, rows=rows).subset(rows.argsort())


def bucket_of(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, … that is not smaller than a number of prompts.

    Of what is computed for such a number less than a third is for nothing, and numbers up to 64 have twelve sizes:
    what is compiled or captured for a size, and memory that is kept for it, is soon used again.
    """
    if count < 3:
        return count
    power = 1 << (count - 1).bit_length()  # the next power of two
    return 3 * power // 4 if count <= 3 * power // 4 else power


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Move a tensor to a GPU without waiting; towards a CPU with, since its values would not be there yet."""
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


def _take(tensor: Tensor, places: Tensor) -> Tensor:
    """Rows of a tensor on any device, by places on the CPU, without waiting for the device."""
    return tensor[places.to(tensor.device, non_blocking=True)]


def prompts_of_targets(asked: Sequence[Prompts], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out prompts of several forms by target, on the CPU, to be shown.

    Args:
        asked: Prompts of one form each, whose `rows` together are all targets.
        count: Number Q of targets.

    Returns:
        Boxes (Q, 4) and points (Q, P, 2), NaN where there is none; labels (Q, P), −1 where there is no point.
    """
    longest = max((prompts.points.shape[1] for prompts in asked if prompts.points is not None), default=0)
    boxes, points = torch.full((count, 4), torch.nan), torch.full((count, longest, 2), torch.nan)
    labels = torch.full((count, longest), -1, dtype=torch.int64)
    for prompts in asked:
        rows = torch.arange(count) if prompts.rows is None else prompts.rows
        if prompts.boxes is not None:
            boxes[rows] = prompts.boxes.float().cpu()
        if prompts.points is not None and prompts.labels is not None:
            points[rows, : prompts.points.shape[1]] = prompts.points.float().cpu()
            labels[rows, : prompts.labels.shape[1]] = prompts.labels.cpu()
    points[labels == -1] = torch.nan
    return boxes, points, labels
