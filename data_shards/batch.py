"""A batch of triplets: images at native size, targets flattened over the batch, each pointing at its image.

Shapes: B images, Q targets, C channels, H W native height and width of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from data_shards.triplet import Provenance, Target, Triplet


@dataclass
class TripletBatch:
    """What a loader yields; resizing, channels and scaling are the model's business, on the device.

    Attributes:
        images: B tensors (C, H, W) at native dtype and size, C being 1 or 3.
        masks: Q tensors (H, W) uint8, 1 inside.
        image_index: (Q,) int64, the image of each target.
        boxes: (Q, 4) float32, tight (x0, y0, x1, y1) in native pixels.
        terms: Q clinical terms.
        keys: B sample keys.
        positions: B positions of the samples in their corpus.
        target_index: Q positions of the targets in their samples.
        provenances: B origins.
    """

    images: list[Tensor]
    masks: list[Tensor]
    image_index: Tensor
    boxes: Tensor
    terms: list[str]
    keys: list[str]
    positions: list[int]
    target_index: list[int]
    provenances: list[Provenance]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sizes(self) -> Tensor:
        """(Q, 2) native height and width of each target's image, on the CPU."""
        sizes = [self.images[i].shape[-2:] for i in self.image_index.tolist()]
        return torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)

    @property
    def identities(self) -> list[tuple[int, int]]:
        """For each target (sample position, target position): what randomness may depend on."""
        images = self.image_index.tolist()
        return [(self.positions[i], t) for i, t in zip(images, self.target_index, strict=True)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TripletBatch:
        """Move images and masks; what is small and indexed by Python stays on the CPU."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return self._replace(images=[move(image) for image in self.images], masks=[move(mask) for mask in self.masks])

    def pin_memory(self) -> TripletBatch:
        """Pin what `to` moves."""
        return self._replace(
            images=[image.pin_memory() for image in self.images], masks=[mask.pin_memory() for mask in self.masks]
        )

    def _replace(self, images: list[Tensor], masks: list[Tensor]) -> TripletBatch:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return TripletBatch(**{**values, "images": images, "masks": masks})


@dataclass(frozen=True)
class Sample:
    """A triplet on its way into a batch: its position in the corpus and the targets chosen from it."""

    position: int
    triplet: Triplet
    chosen: tuple[int, ...]

    @property
    def targets(self) -> list[tuple[int, Target]]:
        """The chosen targets with their positions."""
        return [(index, self.triplet.targets[index]) for index in self.chosen]


def collate(samples: Sequence[Sample]) -> TripletBatch:
    """Put samples into a batch, in order."""
    targets = [(image, index, target) for image, s in enumerate(samples) for index, target in s.targets]
    boxes = [target.box for _, _, target in targets]
    return TripletBatch(
        images=[_to_tensor(sample.triplet.image) for sample in samples],
        masks=[torch.from_numpy(target.mask()) for _, _, target in targets],
        image_index=torch.tensor([image for image, _, _ in targets], dtype=torch.int64),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        terms=[target.term for _, _, target in targets],
        keys=[sample.triplet.key for sample in samples],
        positions=[sample.position for sample in samples],
        target_index=[index for _, index, _ in targets],
        provenances=[sample.triplet.provenance for sample in samples],
    )


def _to_tensor(image: np.ndarray) -> Tensor:
    channels_first = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    # a copy, because an array decoded from a shard may not be written to, and a tensor may
    return torch.from_numpy(channels_first.copy(order="C"))
