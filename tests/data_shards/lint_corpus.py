"""A clean corpus that the tests of the linter damage: three slices of each of sixteen patients, in two splits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter

SIDE = 96
SLICES = 3
Splits = dict[str, list[Triplet]]


def picture(seed: int, shift: int = 0, side: int = SIDE) -> np.ndarray:
    """A body (side, side) uint8 in a black background: organs of all sizes that differ between seeds."""
    rng = np.random.default_rng(seed)
    field = sum(weight * gaussian_filter(rng.normal(size=(side, side)), width) * width
                for width, weight in ((1.5, 1), (3, 2), (8, 4)))  # fmt: skip
    rows, columns = np.mgrid[:side, :side] / side - 0.5
    body = (rows / 0.42) ** 2 + (columns / 0.36) ** 2 < 1
    image = np.where(body, 120 + 30 * np.roll(field, shift, axis=0), 0)
    return image.clip(0, 250).astype(np.uint8)


def disc(row: int = 40, column: int = 45, radius: int = 9) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return (rows - row) ** 2 + (columns - column) ** 2 < radius**2


@cache
def sample(split: str, patient: int, number: int) -> Triplet:
    seed = 1000 * (split == "test") + patient
    name = f"{split}-{patient}"
    image, mask = picture(seed, number), disc(38 + number, 40 + patient % 9)
    image[mask] = image[mask] // 2 + 120
    targets = [Target.from_mask(mask, "liver", kind="semantic")]
    if number:
        targets.append(Target.from_mask(disc(60, 50 + number, 6), "spleen"))
    return Triplet(
        f"toy-{name}-{number}",
        image,
        # in some slices the liver was looked for and is not there
        tuple(targets if patient % 5 else targets[1:]),
        ("liver", "spleen"),
        Provenance(
            dataset="toy", patient=f"p-{name}", volume=f"v-{name}", modality="CT", source_sha256="0" * 64,
            axis="axial", slice_index=number, spacing=(0.75, 0.75), slice_spacing=3.0,
        ),
    )  # fmt: skip


def clean() -> Splits:
    counts = {"train": 12, "test": 4}
    return {
        split: [sample(split, patient, number) for patient in range(count) for number in range(SLICES)]
        for split, count in counts.items()
    }


def write(folder: Path, splits: Mapping[str, Sequence[Triplet]], kind: str | None = None) -> Path:
    """Write splits, and with a kind of split a manifest that says so; eight samples a shard."""
    for name, triplets in splits.items():
        with ShardWriter(folder / name, 8, 2**30) as writer:
            for triplet in triplets:
                writer.write(triplet.key, triplet.encode())
        write_index(folder / name)
    if kind is not None:
        content: dict[str, Any] = {"spec": {"split": {"kind": kind}}, "splits": {name: {} for name in splits}}
        (folder / "manifest.json").write_text(json.dumps({**content, "sources": []}))
    return folder


def with_target(triplet: Triplet, number: int = 0, **changes: Any) -> Triplet:
    """Change fields of one target."""
    targets = list(triplet.targets)
    targets[number] = replace(targets[number], **changes)
    return replace(triplet, targets=tuple(targets))


def with_mask(triplet: Triplet, mask: np.ndarray, number: int = 0) -> Triplet:
    """Put another mask in the place of one."""
    targets = list(triplet.targets)
    targets[number] = Target.from_mask(mask, targets[number].term, targets[number].synonyms, targets[number].kind)
    return replace(triplet, targets=tuple(targets))


def with_origin(triplet: Triplet, **changes: Any) -> Triplet:
    """Change fields of the provenance."""
    return replace(triplet, provenance=replace(triplet.provenance, **changes))
