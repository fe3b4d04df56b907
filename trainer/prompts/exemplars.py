"""Exemplars: boxes and points that show a text-prompted model what is meant, simulated from the truth.

Shapes: P prompts, N targets, K exemplars of a prompt, S side of the masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from data_shards.errors import UserError
from data_shards.seed import run_seed, stream
from trainer.losses.sets import ObjectSets
from trainer.prompts.concepts import Concept, ConceptPrompts
from trainer.prompts.regions import DRAWN_BELOW, drawn

ALONE = "visual"
"""What the official code says where exemplars alone are asked with (Carion et al. 2025)."""


class Exemplars:
    """Shows one instance of some of the concepts that are there, in training; an evaluation asks by text alone.

    Args:
        share: Share of the concepts that get exemplars, in [0, 1].
        boxes: Boxes of different instances, as many as there are at most.
        points: Points on different instances, drawn uniformly on each; the model needs ``points: true``.
        alone: Share of these concepts that are asked by their exemplars alone, without their text, in [0, 1].
        seed: Seed of what is drawn; that of the run (`seed_everything`) if null.
    """

    def __init__(
        self, share: float = 0.5, boxes: int = 1, points: int = 0, alone: float = 0.0, seed: int | None = None
    ) -> None:
        if not 0 <= share <= 1 or not 0 <= alone <= 1:
            raise UserError(f"Exemplars: share and alone are in [0, 1], not {share} and {alone}")
        if boxes < 0 or points < 0 or not boxes + points:
            raise UserError(f"Exemplars: boxes and points are 0 or more and not both 0, not {boxes} and {points}")
        self.share, self.boxes, self.points, self.alone, self.seed = share, boxes, points, alone, run_seed(seed)

    def describe(self) -> dict[str, Any]:
        """What training shows, as JSON."""
        return {"share": self.share, "boxes": self.boxes, "points": self.points, "alone": self.alone}

    def show(self, asked: ConceptPrompts, concepts: Sequence[Concept], truth: ObjectSets, epoch: int) -> ConceptPrompts:
        """Add exemplars to what is asked.

        Args:
            asked: A text for each concept.
            concepts: The concepts.
            truth: Their instances, with masks where points are wanted.
            epoch: The epoch.
        """
        count, device = len(concepts), truth.boxes.device
        rows = np.zeros((count, self.boxes + self.points), dtype=np.int64)
        labels = np.full(rows.shape, -1, dtype=np.int64)
        numbers = np.zeros((count, self.points), dtype=np.int64)
        texts = list(asked.texts)
        for p, (concept, start) in enumerate(zip(concepts, truth.starts, strict=True)):
            generator = stream(self.seed, "exemplars", epoch, *concept.draw)
            shown, alone = generator.random(2)
            if not concept.rows or shown >= self.share:
                continue
            order = start + generator.permutation(truth.counts[p])
            for begin, wanted in ((0, self.boxes), (self.boxes, self.points)):
                found = order[:wanted]
                rows[p, begin : begin + len(found)] = found
                labels[p, begin : begin + len(found)] = 1
            numbers[p] = generator.integers(0, DRAWN_BELOW, size=self.points)
            if alone < self.alone:
                texts[p] = ALONE
        if not len(truth.boxes):  # nothing is there; the encoders of exemplars take part all the same
            truth = replace(truth, boxes=torch.zeros(1, 4, device=device), masks=torch.zeros(1, 8, 8, device=device))
        place, sign = (torch.from_numpy(table).to(device, non_blocking=True) for table in (rows, labels))
        added: dict[str, Any] = {}
        if self.boxes:
            added |= {"boxes": truth.boxes[place[:, : self.boxes]], "box_labels": sign[:, : self.boxes]}
        if self.points:
            assert truth.masks is not None
            side = truth.masks.shape[-1]
            masks = truth.masks[place[:, self.boxes :].flatten()]
            # of a target that is smaller than a pixel, the fullest
            regions = masks > 0.5 * masks.amax((1, 2), keepdim=True)
            points, there = drawn(regions, torch.from_numpy(numbers).reshape(-1, 1))
            points = ((points[:, 0] + 0.5) / side).unflatten(0, (count, self.points))
            on_mask = there.unflatten(0, (count, self.points))
            added |= {"points": points, "point_labels": torch.where(on_mask, sign[:, self.boxes :], -1)}
        return replace(asked, texts=texts, **added)
