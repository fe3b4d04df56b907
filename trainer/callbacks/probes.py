"""What tuning may have cost a model besides its score: its tolerance of prompts that are off.

Shapes: Q targets, N shifts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import inf
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from trainer.callbacks.evaluation import evaluation_folder
from trainer.callbacks.panels import spread_samples
from trainer.metrics import overlap
from trainer.models import SegmentationModel
from trainer.prompts import Prompts
from trainer.prompts.boxes import push
from trainer.ranks import every_rank
from trainer.run import write_json

R = TypeVar("R")

SIDE = 1024
"""Pixels of the input side that shifts are given at, MedSAM's."""


class SampleProbe(Callback, ABC, Generic[R]):
    """Asks a model more about some samples of ``trainer test``; what is asked is a probe's own business.

    Args:
        samples: How many samples are probed, evenly spread over the split, with all of their targets.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._chosen: set[int] = set()
        self._found: dict[tuple[int, int], R] = {}

    @abstractmethod
    def probe(self, module: LightningModule, batch: TripletBatch, image: int) -> dict[tuple[int, int], R]:
        """Probe one image of a batch: what is found, by (sample position, number in the sample)."""

    @abstractmethod
    def record(self, folder: Path, found: dict[tuple[int, int], R]) -> None:
        """Write what all ranks found, at least something, into the evaluation's folder."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the samples.

        Raises:
            UserError: The model lies in shards, which only all ranks together can decode with.
        """
        refuse_shards(trainer, type(self).__name__, "probes its own samples")
        batches = trainer.num_test_batches[0]
        self._chosen = set(spread_samples(trainer.test_dataloaders, batches, self.samples))
        self._found = {}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Probe the batch's chosen samples."""
        images = [image for image, position in enumerate(batch.positions) if position in self._chosen]
        with torch.no_grad(), trainer.precision_plugin.test_step_context():
            for image in images:
                self._found |= self.probe(pl_module, batch, image)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was found."""
        found = {place: result for part in every_rank(self._found) for place, result in part.items()}
        if trainer.is_global_zero and found:
            self.record(evaluation_folder(trainer), {place: found[place] for place in sorted(found)})


def refuse_shards(trainer: Trainer, name: str, why: str) -> None:
    """Refuse a model that lies in shards, where each rank works on its own.

    Args:
        trainer: The trainer.
        name: Of the callback.
        why: What each rank does.

    Raises:
        UserError: It does.
    """
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        raise UserError(f"{name}: each rank {why}: set trainer.strategy to ddp or devices to 1")


class BoxJitterProbe(SampleProbe[list[float]]):
    """Scores some targets of ``trainer test`` with boxes that are too large and too small, into ``jitter.json``.

    Every side of the tight box is pushed outwards, and then inwards, by so many pixels. Each image is encoded once for
    all of them. The report draws the curves of the untouched and the tuned model in one chart: a model that was tuned
    on tight boxes alone may have forgotten how to take loose ones.

    Args:
        shifts: Pixels at an input of 1024 px a side; at another side as much less or more.
        samples: How many samples are probed, evenly spread over the split, with all of their targets.
    """

    def __init__(self, shifts: tuple[float, ...] = (0, 5, 10, 20), samples: int = 64) -> None:
        if not shifts or not all(0 <= shift < inf for shift in shifts) or samples < 1:
            raise UserError(
                f"BoxJitterProbe: shifts are 0 or more, not {list(shifts)}; samples 1 or more, not {samples}"
            )
        super().__init__(samples)
        self.shifts = tuple(sorted({way * shift + 0.0 for shift in shifts for way in (-1, 1)}))

    def probe(self, module: LightningModule, batch: TripletBatch, image: int) -> dict[tuple[int, int], list[float]]:
        """DSC of each target of one image at each shift.

        Raises:
            UserError: The model is asked in words.
        """
        if hasattr(module, "wording"):
            raise UserError(
                "trainer.callbacks: BoxJitterProbe asks with boxes, and this model takes words: take BoxGivenProbe"
            )
        assert isinstance(module.model, SegmentationModel)
        return probe(module.model, batch, image, self.shifts, module.device)

    def record(self, folder: Path, found: dict[tuple[int, int], list[float]]) -> None:
        """Write the curve."""
        dsc = np.array(list(found.values()))
        q1, median, q3 = np.percentile(dsc, [25, 50, 75], axis=0)
        columns = {"mean": dsc.mean(axis=0), "q1": q1, "median": median, "q3": q3}
        content = {
            "side": SIDE,
            "samples": len({position for position, _ in found}),
            "targets": len(found),
            "shifts": list(self.shifts),
            "dsc": {name: [round(float(value), 6) for value in values] for name, values in columns.items()},
        }
        write_json(folder / "jitter.json", content)


def probe(
    model: SegmentationModel, batch: TripletBatch, image: int, shifts: tuple[float, ...], device: torch.device
) -> dict[tuple[int, int], list[float]]:
    """DSC of one image's targets at native resolution for boxes pushed outwards.

    Args:
        model: The model.
        batch: The batch that the image is in.
        image: Its place in the batch.
        shifts: N pixels at a side of `SIDE`, below 0 inwards.
        device: The model's.

    Returns:
        For each target (sample position, target position) its N scores.
    """
    preprocessing = model.preprocessing
    rows = [q for q, owner in enumerate(batch.image_index.tolist()) if owner == image]
    if not rows:
        return {}
    boxes, sizes = preprocessing.boxes(batch.boxes[rows], batch.sizes[rows])
    truths = torch.stack([batch.masks[q] for q in rows]).to(device)
    features = model.encode(preprocessing.images([batch.images[image]], device))
    index = torch.zeros(len(rows), dtype=torch.int64, device=device)
    columns = []
    for shift in shifts:
        pixels = torch.full_like(boxes, shift * preprocessing.image_size / SIDE)
        asked = Prompts(index, boxes=push(boxes, pixels, sizes).to(device))
        logits, _ = model.decode(features, asked)
        masks = preprocessing.to_native(logits[:, 0], *truths.shape[-2:]) > 0
        columns.append(overlap(masks, truths)[0].tolist())
    return {batch.identities[q]: list(scores) for q, scores in zip(rows, zip(*columns, strict=True), strict=True)}
