"""The gate: an export is verified when the consumer's own code loads it and agrees on real images.

Shapes: Q prompts of one image, S the consumer's input side.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_shards.batch import Sample, TripletBatch, collate
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from trainer.export.base import Exporter
from trainer.metrics import overlap
from trainer.models import SegmentationModel
from trainer.prompts import Prompts

TOLERANCE = 1e-3
"""Largest difference of a logit in fp32 between our model and the consumer's."""


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        verified: Whether every logit agreed.
        consumer: The consumer's distribution and version.
        max_logit_difference: Largest difference over all pixels of all samples.
        samples: Real images compared.
        image_size: Input side of the comparison, the consumer's.
        dsc_run: Mean DSC of our model at the side it was trained at, on these samples.
        dsc_consumer: Mean DSC of the consumer's model at its own side, on these samples.
    """

    verified: bool
    consumer: str
    consumer_version: str
    max_logit_difference: float
    tolerance: float
    samples: int
    image_size: int
    dsc_run: float
    dsc_consumer: float


def require_consumer(exporter: Exporter) -> str:
    """The consumer's version.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.metadata.version(exporter.package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"the gate of '{exporter.name}' needs the tool that reads the file: pip install {exporter.requirement}; "
            "--unverified writes without it"
        ) from None


def real_samples(folder: str | None, count: int) -> list[TripletBatch]:
    """Images to compare on, evenly spread over a split.

    Args:
        folder: The split's shards.
        count: How many.

    Raises:
        UserError: There are no shards, or no targets in them.
    """
    if folder is None or not Path(folder).is_dir():
        where = f"{folder} is missing" if folder else "the run's recipe names no test split"
        raise UserError(f"the gate needs real images and {where}: give --images FOLDER, a split of verified shards")
    shards = ShardDataset(Path(folder))
    useful = np.flatnonzero(np.diff(shards.index.target_start))
    chosen = useful[np.linspace(0, len(useful) - 1, min(count, len(useful))).round().astype(int)].tolist()
    triplets = [(position, shards[position]) for position in chosen]
    samples = [collate([Sample(position, t, tuple(range(len(t.targets))))]) for position, t in triplets]
    if not samples:
        raise UserError(f"the gate needs images with targets and found none in {folder}: give --images FOLDER")
    return samples


@torch.no_grad()
def compare(exporter: Exporter, path: Path, model: SegmentationModel, samples: Sequence[TripletBatch]) -> Verdict:
    """Load an export with its consumer and compare logits, on the CPU in fp32.

    Args:
        exporter: The format.
        path: The exported file.
        model: Our model, adapters merged, in evaluation mode.
        samples: Real images with targets.

    Raises:
        UserError: The consumer cannot load the file.
    """
    version = require_consumer(exporter)
    try:
        consumer = exporter.load(path)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"export to '{exporter.name}' failed: {exporter.package} cannot load it ({reason})") from error
    there = model.at_size(exporter.image_size)
    gaps: list[Tensor] = []
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for batch in samples:
        images, boxes = there.preprocessing.images(batch.images), there.preprocessing.boxes(batch.boxes, batch.sizes)[0]
        found = consumer(images, boxes)
        gaps.append((found - _logits(there, batch)).abs().max())
        ours.append(_dsc(model, batch, _logits(model, batch)))
        theirs.append(_dsc(there, batch, found))
    difference = float(torch.stack(gaps).max())  # NaN if any is, and NaN is not verified
    return Verdict(
        verified=difference <= TOLERANCE,
        consumer=exporter.package,
        consumer_version=version,
        max_logit_difference=difference,
        tolerance=TOLERANCE,
        samples=len(samples),
        image_size=exporter.image_size,
        dsc_run=float(torch.cat(ours).mean()),
        dsc_consumer=float(torch.cat(theirs).mean()),
    )


def _logits(model: SegmentationModel, batch: TripletBatch) -> Tensor:
    """Our model's logits (Q, h, w) for a batch of one image."""
    preprocessing = model.preprocessing
    boxes, _ = preprocessing.boxes(batch.boxes, batch.sizes)
    masks, _ = model.decode(model.encode(preprocessing.images(batch.images)), Prompts(batch.image_index, boxes))
    return masks[:, 0]


def _dsc(model: SegmentationModel, batch: TripletBatch, logits: Tensor) -> Tensor:
    """DSC (Q,) at native resolution of logits in a model's frame."""
    height, width = batch.images[0].shape[-2:]
    masks = model.preprocessing.to_native(logits, height, width) > 0
    return overlap(masks, torch.stack(batch.masks))[0]
