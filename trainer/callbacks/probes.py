"""What tuning may have cost a model besides its score: its tolerance of prompts that are off.

Shapes: Q targets, N shifts.
"""

from __future__ import annotations

from math import inf
from typing import Any

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

SIDE = 1024
"""Pixels of the input side that shifts are given at, MedSAM's."""


class BoxJitterProbe(Callback):
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
        self.shifts = tuple(sorted({way * shift + 0.0 for shift in shifts for way in (-1, 1)}))
        self.samples = samples
        self._chosen: set[int] = set()
        self._found: dict[tuple[int, int], list[float]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the samples.

        Raises:
            UserError: The model lies in shards, which only all ranks together can decode with.
        """
        if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
            raise UserError(
                "BoxJitterProbe: each rank probes its own samples: set trainer.strategy to ddp or devices to 1"
            )
        batches = trainer.num_test_batches[0]
        self._chosen = set(spread_samples(trainer.test_dataloaders, batches, self.samples))
        self._found = {}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Probe the batch's chosen samples."""
        model = pl_module.model
        assert isinstance(model, SegmentationModel)
        images = [image for image, position in enumerate(batch.positions) if position in self._chosen]
        with torch.no_grad(), trainer.precision_plugin.test_step_context():
            for image in images:
                self._found |= probe(model, batch, image, self.shifts, pl_module.device)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the curve."""
        found = {target: row for part in every_rank(self._found) for target, row in part.items()}
        if not trainer.is_global_zero or not found:
            return
        dsc = np.array([found[target] for target in sorted(found)])
        q1, median, q3 = np.percentile(dsc, [25, 50, 75], axis=0)
        columns = {"mean": dsc.mean(axis=0), "q1": q1, "median": median, "q3": q3}
        content = {
            "side": SIDE,
            "samples": len({position for position, _ in found}),
            "targets": len(found),
            "shifts": list(self.shifts),
            "dsc": {name: [round(float(value), 6) for value in values] for name, values in columns.items()},
        }
        write_json(evaluation_folder(trainer) / "jitter.json", content)


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
