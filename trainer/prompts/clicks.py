"""Clicks that correct what the model got wrong.

Shapes: Q targets, P points a target, S the model's input side, h w the mask side of the model's decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.errors import UserError
from data_shards.seed import run_seed, stream
from trainer.prompts.base import Prompter, Prompts, Truth, merged
from trainer.prompts.mixed import MixedPrompts
from trainer.prompts.points import PointPrompts
from trainer.prompts.regions import DRAWN_BELOW, deepest, drawn, first_with_pixels, inside, on_target
from trainer.prompts.sam_boxes import SAMBoxPrompts


class ClickPrompts(Prompter):
    """First a box or a point, then clicks where the answer was wrong: SAM's training.

    Each click is drawn uniformly from the pixels that were wrong: on the target where it was missed, beside it where
    too much was taken; where nothing is wrong, from the target. In evaluation it is the pixel farthest from the border
    of what was missed or of what was too much. What an evaluation scores is the answer to its last click.
    Source: Kirillov et al. 2023 (arXiv:2304.02643), appendices A, "Training algorithm", and D.1.

    Args:
        start: Who asks first; if null a box (`SAMBoxPrompts`) or a point (`PointPrompts`) with equal chance, as in
            SAM, and in evaluation the box.
        corrections: Clicks after the first prompt in training.
        blank: Rounds of training without a new click, in which the model refines its own mask: the last round, and the
            others at random places among the clicks.
        mask: Give the logits of the answer back with the next click, as a mask prompt.
        eval_corrections: Clicks after the first prompt in evaluation.
        seed: Seed of the clicks; that of the run (`seed_everything`) if null.
    """

    def __init__(
        self,
        start: Prompter | None = None,
        corrections: int = 8,
        blank: int = 2,
        mask: bool = True,
        eval_corrections: int = 0,
        seed: int | None = None,
    ) -> None:
        if min(corrections, blank, eval_corrections) < 0:
            raise UserError(
                "ClickPrompts: corrections, blank and eval_corrections are 0 or more, not "
                f"{corrections}, {blank} and {eval_corrections}"
            )
        if blank and not mask:
            raise UserError(f"ClickPrompts: blank {blank} repeats a question unless mask is true: set blank to 0")
        if start is not None and (start.rounds(0) or start.rounds(None)):
            raise UserError(f"ClickPrompts: start {type(start).__name__} corrects itself: take one that does not")
        self.seed = run_seed(seed)
        self.start = start or MixedPrompts([SAMBoxPrompts(seed=seed), PointPrompts(seed=seed)], seed=seed)
        self.corrections, self.blank, self.mask, self.eval_corrections = corrections, blank, mask, eval_corrections

    def describe(self) -> dict[str, Any]:
        """What an evaluation asks, as JSON."""
        return {
            "kind": type(self).__name__,
            "first": self.start.describe(),
            "corrections": self.eval_corrections,
            "mask": self.mask,
        }

    def rounds(self, epoch: int | None) -> int:
        """How often `correct` is called after `first`; the epoch is None in evaluation."""
        return self.eval_corrections if epoch is None else self.corrections + self.blank

    def first(self, truth: Truth, epoch: int | None) -> list[Prompts]:
        """Ask about every target once."""
        return self.start.first(truth, epoch)

    @torch.no_grad()
    def correct(
        self, asked: list[Prompts], logits: Tensor, truth: Truth, epoch: int | None, correction: int
    ) -> list[Prompts]:
        """Ask again, each target with one more click, or with none in its blank rounds; see `Prompter.correct`."""
        if not len(truth):
            return asked
        blank = self._blank(truth.draws, epoch, correction)
        points, labels = (None, None) if blank.all() else self._clicks(logits, truth, epoch, correction)
        again = []
        for prompts in asked:
            prompts = prompts.to(logits.device)
            rows = torch.arange(len(truth)) if prompts.rows is None else prompts.rows
            for is_blank in (False, True):
                places = (blank[rows] == is_blank).nonzero()[:, 0]
                if not len(places):
                    continue
                part = prompts.subset(places)
                chosen = rows[places].to(logits.device, non_blocking=True)
                if self.mask:
                    part = replace(part, masks=logits[chosen].float())
                if points is not None and labels is not None and not is_blank:
                    part = _with_point(part, points[chosen], labels[chosen])
                again.append(part)
        return merged(again)

    def _blank(self, draws: Sequence[tuple[int, ...]], epoch: int | None, correction: int) -> Tensor:
        """Which targets get no click in this round: (Q,) bool, on the CPU."""
        last = self.rounds(epoch) - 1
        if epoch is None or not self.blank:
            return torch.zeros(len(draws), dtype=torch.bool)
        if correction == last:
            return torch.ones(len(draws), dtype=torch.bool)
        # the number 0 sets this apart from the rounds' own numbers, which begin at 1
        streams = (stream(self.seed, "clicks", epoch, 0, *draw) for draw in draws)
        places = [numbers.choice(last, size=self.blank - 1, replace=False) for numbers in streams]
        return torch.tensor([correction in chosen for chosen in places])

    def _clicks(self, logits: Tensor, truth: Truth, epoch: int | None, correction: int) -> tuple[Tensor, Tensor]:
        """Where each target's next click goes: points (Q, 2) and labels (Q,)."""
        target = on_target(truth)
        full = F.interpolate(logits[:, None].float(), truth.masks.shape[-2:], mode="bilinear")[:, 0]
        wrong = ((full > 0) != target) & inside(truth)
        if epoch is None:
            return _deepest_errors(wrong, target)
        numbers = [
            [int(stream(self.seed, "clicks", epoch, correction + 1, *draw).integers(0, DRAWN_BELOW))]
            for draw in truth.draws
        ]
        found, there = drawn(first_with_pixels(wrong, target), torch.tensor(numbers))
        points = found[:, 0]
        x, y = points.long().unbind(1)
        on = target[torch.arange(len(target), device=x.device), y, x]
        return points, torch.where(there, on.long(), -1)


def _deepest_errors(wrong: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The pixel farthest from the border of what was missed, or of what was too much, whichever is deeper.

    Args:
        wrong: (Q, S, S) bool.
        target: (Q, S, S) bool.

    Returns:
        Points (Q, 2) and labels (Q,) on the same device; where nothing is wrong, the innermost point of the target.
    """
    places, labels = [], []
    for errors, truth in zip(wrong.cpu().numpy(), target.cpu().numpy(), strict=True):
        options = ((errors & truth, 1), (errors & ~truth, 0)) if errors.any() else ((truth, 1),)
        found = [(*deepest(np.asarray(region)), label) for region, label in options]
        depth, x, y, label = max(found, key=lambda option: option[0])
        places.append([float(x), float(y)])
        labels.append(label if depth > 0 else -1)
    return torch.tensor(places, device=wrong.device), torch.tensor(labels, device=wrong.device)


def _with_point(prompts: Prompts, points: Tensor, labels: Tensor) -> Prompts:
    """Add a point (Q, 2) with its label (Q,) to what was asked."""
    if prompts.points is None or prompts.labels is None:
        return replace(prompts, points=points[:, None], labels=labels[:, None])
    return replace(
        prompts,
        points=torch.cat([prompts.points, points[:, None]], dim=1),
        labels=torch.cat([prompts.labels, labels[:, None]], dim=1),
    )
