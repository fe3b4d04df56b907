"""A SAM2 of 0.9 M random weights, and volumes whose objects move, come and go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_shards.batch import TripletBatch, collate
from data_shards.dataset import ShardDataset
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.views import ClipView
from data_shards.writer import ShardWriter
from trainer.models import SAM2, SAM2Shape

SIDE = 64
SHAPE = SAM2Shape(
    embed_dim=16, stages=(1, 2, 2, 1), global_blocks=(4,), window_spec=(8, 4, 4, 2), background=4, width=32,
    memory_width=16, memory_layers=1, feedforward=64,
)  # fmt: skip
SHAPE_ARGUMENTS = {
    "embed_dim": 16, "num_heads": 1, "stages": [1, 2, 2, 1], "global_blocks": [4], "window_spec": [8, 4, 4, 2],
    "background": 4, "width": 32, "memory_width": 16, "memory_layers": 1, "feedforward": 64,
}  # fmt: skip
"""The same as a recipe writes it."""
LENGTH = 6
"""Slices of a volume."""
SIZE = (48, 40)


def make(seed: int = 0, **arguments: Any) -> SAM2:
    """A tiny SAM2 in training mode; no weight is zero, and objects are held to be there."""
    torch.manual_seed(seed)
    model = SAM2(SHAPE, SIDE, weights=None, **{"dropout": 0.0, **arguments})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
            if name.endswith("gamma"):
                parameter.fill_(0.1)  # 1e-6 would hide the memory encoder's fuser
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
    return model


def slice_of(volume: int, number: int) -> Triplet:
    """A slice with a disc that drifts, and a square that is gone from slice 3 on."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    disc = (rows - 14 - 2 * number) ** 2 + (columns - 12 - volume) ** 2 < 49
    square = (rows > 30) & (rows < 42) & (columns > 20 + number) & (columns < 32 + number) & (number < 3)
    noise = np.random.default_rng((volume, number)).normal(120, 5, SIZE)
    image = (noise + 90 * disc - 90 * square).clip(0, 255).astype(np.uint8)
    masks = (("disc", disc), ("square", square))
    targets = tuple(Target.from_mask(mask.astype(np.uint8), term) for term, mask in masks if mask.any())
    names = {"previous": number - 1, "next": number + 1}
    side = {name: f"v{volume}-{n}" if 0 <= n < LENGTH else None for name, n in names.items()}
    origin = Provenance(
        "moving", f"p{volume}", f"v{volume}", "MR", "0" * 64, "axial", number, (1.0, 1.0), 2.0, {}, **side
    )
    return Triplet(f"v{volume}-{number}", image, targets, ("disc", "square"), origin)


def write_volumes(folder: Path, volumes: range) -> Path:
    """Shards of some volumes."""
    with ShardWriter(folder, 100, 2**24) as writer:
        for volume in volumes:
            for number in range(LENGTH):
                triplet = slice_of(volume, number)
                writer.write(triplet.key, triplet.encode())
    write_index(folder)
    return folder


def clips(folder: Path, positions: list[int], frames: int = 4, anchor: Any = "first", **named: Any) -> TripletBatch:
    """A batch of clips that begin at some samples."""
    view = ClipView(ShardDataset(folder), frames, anchor=anchor, **named)
    return collate([view[0, position] for position in positions], frames)  # type: ignore[misc]


def without(batch: TripletBatch, rows: list[int]) -> TripletBatch:
    """A batch without some of its targets."""
    kept = [row for row in range(len(batch.masks)) if row not in rows]
    return replace(
        batch,
        masks=[batch.masks[row] for row in kept],
        image_index=batch.image_index[kept],
        boxes=batch.boxes[kept],
        terms=[batch.terms[row] for row in kept],
        target_index=[batch.target_index[row] for row in kept],
        objects=[batch.objects[row] for row in kept],
        kinds=[batch.kinds[row] for row in kept],
        synonyms=[batch.synonyms[row] for row in kept],
    )
